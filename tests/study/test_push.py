"""`merge … --push` against a stand-in hub: what is refused before the merge, and what arrives."""

import json
import shutil

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load_file

from optmerge_core import open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.study.push import Push, PushError, licence_at

REPO = "ada/merged"


def card(licence):
    return f"---\nlicense: {licence}\n---\n"


@pytest.fixture
def recipe(tiny, hub, tmp_path):
    """Base and two experts on the hub, one expert in a folder; the base's card alone says mit."""
    for repo, folder in {"maker/base": tiny.base, "maker/ocr": tiny.experts["ocr"]}.items():
        hub.add(repo, folder)
    (hub.root / "maker/base/README.md").write_text(card("mit"))
    chart = shutil.copytree(tiny.experts["chart"], tmp_path / "chart")
    models = [{"name": "ocr", "model": "maker/ocr"}, {"name": "chart", "model": str(chart)}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": "maker/base", "models": models}))
    return path


@pytest.fixture
def push(recipe, tmp_path):
    def run(*more, repo=REPO, out="out"):
        given = ["--method", "ties", "--output", str(tmp_path / out), "--no-check"]
        return main(["merge", str(recipe), *given, "--push", repo, *more])

    return run


def test_a_merge_is_pushed_private_and_whole(hub, push, tmp_path, capsys):
    assert push() == 0
    assert f"pushed: {hub.url}/{REPO}" in capsys.readouterr().out
    assert hub.private == {REPO} and hub.commits == [(REPO, "Upload the merge")]
    out = tmp_path / "out"
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert hub.files(REPO) == sorted([".gitattributes", *written])
    assert all((hub.root / REPO / x).read_bytes() == (out / x).read_bytes() for x in written)
    front_matter = yaml.safe_load((hub.root / REPO / "README.md").read_text().split("---\n")[1])
    assert front_matter == {
        "library_name": "transformers", "tags": ["merge", "optmerge"], "license": "mit",
        "base_model": ["maker/base", "maker/ocr"], "base_model_relation": "merge",
    }  # fmt: skip
    pushed, merged = open_checkpoint(REPO, stream=True), open_checkpoint(out)
    assert all((pushed[name] == merged[name]).all() for name in merged) and len(pushed) > 14


def test_public_and_the_licence_are_as_said(hub, push):
    assert push("--public", "--license", "apache-2.0", repo="guild/merged") == 0
    assert hub.private == set() and hub.files("guild/merged")
    text = (hub.root / "guild/merged/README.md").read_text()
    assert "license: apache-2.0\n" in text and "license: mit" not in text
    assert "| base model | mit | – |" in text  # what the inputs' cards say stays


REFUSED = [
    ("merged", (), "give OWNER/NAME"),
    ("ada/mer ged", (), "give OWNER/NAME"),
    ("ada/merged@v1", (), "give OWNER/NAME"),
    ("ada/a--b", (), "Cannot have -- or .."),
    ("eve/merged", (), "the token is ada's, no member of eve; give one of ada, guild"),
    ("ada/full", (), "ada/full has 1 files already (config.json): choose another name"),
    ("ada/full", ("--public",), "ada/full exists and is private: leave --public out"),
    ("ada/public", (), "ada/public exists and is public: say --public"),
    (REPO, ("--license", "do-what-you-want"), "does not know the licence 'do-what-you-want'"),
]


@pytest.mark.parametrize(("repo", "more", "said"), REFUSED)
def test_what_cannot_be_pushed_is_refused_before_the_merge(
    hub, push, tmp_path, capsys, repo, more, said
):
    for name, file in {"ada/full": "config.json", "ada/public": ".gitattributes"}.items():
        (hub.root / name).mkdir(parents=True)
        (hub.root / name / file).write_text("{}")
    hub.private.add("ada/full")
    assert push(*more, repo=repo) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not hub.stored
    assert not [path for path, _ in hub.requests if path.endswith(".safetensors")]


def test_without_a_token_that_may_write_nothing_begins(hub, push, tmp_path, capsys, monkeypatch):
    hub.me["auth"]["accessToken"]["role"] = "read"
    assert push() == 1 and "the token of ada may read, not write" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert push() == 1 and "Invalid user token" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert push() == 1 and "no token of the hub; log in" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push() == 1 and "unset HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_licences_are_known_before_the_merge(hub, push, tmp_path, capsys):
    for text, said in (("# none", "names a licence; give the merge's own with --license"),
                       (card("my-own"), "does not know the licence 'my-own'")):  # fmt: skip
        (hub.root / "maker/base/README.md").write_text(text)
        assert push() == 1 and said in capsys.readouterr().err
    (tmp_path / "chart/README.md").write_text(card("cc-by-nd-4.0"))
    assert push("--license", "mit") == 1
    said = capsys.readouterr().err
    assert "(expert chart: cc-by-nd-4.0 (forbids derivatives)); leave the models out, or" in said
    assert not (tmp_path / "out").exists()
    assert push("--license", "other", "--despite-license") == 0
    assert "expert chart: cc-by-nd-4.0 (forbids derivatives)" in capsys.readouterr().err
    assert "| chart | cc-by-nd-4.0 | derivatives |" in (hub.root / REPO / "README.md").read_text()


def test_an_output_that_exists_is_refused_before_the_hub_is_asked(hub, push, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    assert push() == 1 and "exists: choose another output folder" in capsys.readouterr().err
    assert hub.requests == []


def test_options_of_a_push_without_one_are_refused(recipe, tmp_path, capsys):
    command = ["merge", str(recipe), "--output", str(tmp_path / "out"), "--public", "--replace"]
    assert main(command) == 1
    assert "--public, --replace: only with --push OWNER/NAME" in capsys.readouterr().err


def test_a_failed_push_leaves_the_merge_and_is_gone_on_with_by_hand(hub, push, tmp_path, capsys):
    hub.faults["/api/models/ada/merged/commit"] = [{"status": 403}]
    assert push() == 1
    said, out = capsys.readouterr().err, tmp_path / "out"
    command = f"hf upload {REPO} {out} . --private"
    assert f"{out} is whole, but not pushed (" in said and f"`{command}`, which goes on" in said
    assert len(open_checkpoint(out)) > 14 and (out / "README.md").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert hub.files(REPO) == [".gitattributes"]
    arrived = [path for path, _ in hub.requests if path.startswith("/lfs/")]
    hub.requests.clear()
    api = huggingface_hub.HfApi()  # as `hf upload` does it
    api.upload_folder(repo_id=REPO, folder_path=out)
    assert arrived and not [path for path, _ in hub.requests if path.startswith("/lfs/")]
    assert set(hub.files(REPO)) > {path.name for path in open_checkpoint(out).files}


def test_a_repository_that_was_filled_meanwhile_is_not_pushed_over(hub, tmp_path, tiny):
    push = Push(REPO, licence="mit")
    push.check({"base model": str(tiny.base)})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [x]\n---\n# Merge\n")
    (hub.root / REPO).mkdir(parents=True)
    (hub.root / REPO / "theirs.txt").touch()
    hub.private.add(REPO)
    said = (
        "is whole, but not pushed: ada/merged has 1 files already .*hf upload OWNER/NAME .*/out ."
    )
    with pytest.raises(PushError, match=said):
        push.send(folder)
    assert hub.files(REPO) == ["theirs.txt"]


def test_replacing_takes_the_place_of_all_files(hub, push, tmp_path):
    (hub.root / REPO).mkdir(parents=True)
    for name in (".gitattributes", "model-00007-of-00009.safetensors", "old.json"):
        (hub.root / REPO / name).write_text("{}")
    hub.private.add(REPO)
    assert push("--replace") == 0
    names = hub.files(REPO)
    assert not {"old.json", "model-00007-of-00009.safetensors"} & {*names}
    assert {".gitattributes", "config.json", "merge_report.json"} <= {*names}
    files = [hub.root / REPO / name for name in names if name.endswith(".safetensors")]
    assert sum(len(load_file(file)) for file in files) == len(open_checkpoint(tmp_path / "out"))


def test_an_interrupted_push_says_how_to_go_on(hub, push, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
    assert push("--public") == 130
    said = capsys.readouterr().err
    assert f"hf upload {REPO} {tmp_path / 'out'} . --no-private`" in said
    assert said.endswith("interrupted\n") and len(open_checkpoint(tmp_path / "out")) > 14


def test_a_card_is_found_wherever_a_model_is(hub, tmp_path):
    folder = hub.root / "maker/one"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card("mit"))
    at = f"{hub.url}/maker/one/resolve/main"
    mit = {"license": "mit"}
    assert licence_at(str(folder)) == licence_at("maker/one") == licence_at(f"{at}/") == mit
    (folder / "README.md").rename(folder / "config.json")
    assert licence_at(str(folder)) == licence_at("maker/one") == licence_at(at) == {}
    with pytest.raises(ValueError, match="maker/none .revision main.: no such folder, and the hub"):
        licence_at("maker/none")


def test_an_omni_model_is_pushed_too(hub, tmp_path, family):
    models = [{"name": name, "model": str(place)} for name, place in family.folders.items()]
    content = {"merges": "modalities", "base_model": str(family.base), "models": models}
    path = tmp_path / "omni.yaml"
    path.write_text(yaml.safe_dump(content))
    given = ["--output", str(tmp_path / "omni"), "--no-check", "--method", "ties"]
    assert main(["merge", str(path), *given, "--push", REPO, "--license", "mit"]) == 0
    assert json.loads((hub.root / REPO / "config.json").read_text())["model_type"]
    assert "license: mit\n" in (hub.root / REPO / "README.md").read_text()
    assert any(name.startswith("specialists/") for name in hub.files(REPO))
