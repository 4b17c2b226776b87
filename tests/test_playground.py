"""The playground in JupyterLab, in a headless Chromium: a slider moves, the picture changes."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from browser import Browser, chromium, until

ROOT = Path(__file__).resolve().parents[1]
PLAYGROUND = ROOT / "notebooks" / "playground.ipynb"
SHOWN = """[...document.querySelectorAll(".widget-image")][0]"""
CONTENT = f"""fetch({SHOWN}.src).then(r => r.arrayBuffer()).then(
  b => Array.from(new Uint8Array(b)).reduce((sum, x) => (31 * sum + x) % 4294967291, 7))"""
"""A number that tells pictures apart."""

slow = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no chromium is installed"),
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on an empty folder of its own: (its address, the folder)."""
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(state / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    options = [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", "--no-browser"]
    options += ["--IdentityProvider.token=", "--ServerApp.allow_root=True"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | places | {"IPYTHONDIR": str(state / "ipython")},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def answers():
        try:
            with urllib.request.urlopen(f"{url}/api/status", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            assert process.poll() is None, (tmp_path / "lab.log").read_text()
            return False

    try:
        until(answers, "JupyterLab does not start")
        yield url, folder
    finally:  # with its kernels, which it would wait for
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class TestInChromium:
    pytestmark = slow

    def test_moving_a_slider_changes_the_picture(self, lab, tmp_path):
        url, folder = lab
        (folder / PLAYGROUND.name).write_bytes(PLAYGROUND.read_bytes())
        with Browser(tmp_path / "chromium") as page:
            page.open(f"{url}/lab/tree/{PLAYGROUND.name}")
            page.wait("window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell')")
            page.wait("window.jupyterapp.serviceManager.kernels.running().next().value")
            page.compute("window.jupyterapp.commands.execute('notebook:run-all-cells'), 1")
            page.wait(f"{SHOWN} && {SHOWN}.complete && {SHOWN}.naturalWidth > 100")
            before = page.compute(CONTENT)
            page.wait("document.querySelector('.noUi-handle')")
            page.compute("document.querySelector('.noUi-handle').focus()")
            for code, key in ((37, "ArrowLeft"), (39, "ArrowRight")):
                page.press(key, code)
                until(lambda seen=before: page.compute(CONTENT) != seen, f"{key} changes nothing")
                before = page.compute(CONTENT)

    def test_a_saved_sound_plays_in_an_untrusted_notebook(self, lab, tmp_path):
        from optmerge_core.benchmark.play import player

        url, folder = lab
        sound = player(np.sin(np.arange(16000) / 10), 16000)
        output = nbformat.v4.new_output("display_data", data={"text/html": sound.data})
        cell = nbformat.v4.new_code_cell("1", outputs=[output], execution_count=1)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "sound.ipynb")
        with Browser(tmp_path / "chromium") as page:
            page.open(f"{url}/lab/tree/sound.ipynb")
            seconds = page.wait("document.querySelector('.jp-OutputArea audio')?.duration")
        assert seconds == pytest.approx(1.0)
