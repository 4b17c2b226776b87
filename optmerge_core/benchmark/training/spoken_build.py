"""What is trained of the study `smol_omni`, and with which settings; it goes on where it stopped.

Sizes, in float16: an adapter of rank r on SmolLM2's linear layers has 305 280 r numbers (at rank 8
4.88 MB), the projectors have 1.85 (vision) and 2.43 MB (speech). Language model, two specialists
and the decoupled ones (two adapters of rank 2 each, without projectors: 2.44 MB) make 23.8 MB.
"""

import json
import time
from pathlib import Path

from safetensors.torch import load_file

from optmerge_core.benchmark.models import spoken as models
from optmerge_core.benchmark.models.ear import build_ear
from optmerge_core.benchmark.models.smol import build_processor, build_tokenizer
from optmerge_core.benchmark.training import hearing, spoken
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.benchmark.training.listening import Clips, listen
from optmerge_core.benchmark.training.loop import save, spent, write_log
from optmerge_core.places import checkout

LANGUAGE_MODEL = {"learning_rate": 6e-4, "steps": 400, "batch": 16, "rank": 8, "seed": 300}
SPECIALIST = {"learning_rate": 5e-4, "batch": 16, "rank": 8}
DECOUPLED = {"rank": 2, "decoupled": True}  # DAMC's: two adapters a specialist
CONTROL = {"rank": 1, "words": False}  # what the projector alone is worth, at the same steps
STEPS = {"vision": 240, "speech": 400}
HEARD = {"train": 6000, "validation": 300}
"""Split -> exchanges that are spoken, of which some are left out; see `listening`."""
ASKED = 60
"""exchanges of each skill that a validation asks"""


def jobs(seeds=SEEDS):
    """Name -> settings of `train_specialist`, in the order in which one needs the other."""
    found = {}
    for seed in seeds:
        for number, modality in enumerate(models.MODALITIES):
            own = SPECIALIST | {"steps": STEPS[modality], "seed": seed + number}
            found[f"seed{seed}/{modality}"] = own
            if (seed, modality) == (SEEDS[0], "vision"):
                found["controls/vision"] = own | CONTROL
            found[f"seed{seed}/decoupled/{modality}"] = own | DECOUPLED
    return found


def build(output, only=None, seeds=SEEDS, sight=None):
    """Train what is shipped of the study into `output`: what is there is kept.

    language_model (its adapter, and the folder that is built of it), ear, clips (features of
    speech, which do not ship), specialists (built), then of every seed what `jobs` names. only: one
    of these names. sight: the study smol's tower and projector (default:
    data/benchmark/smol/sight.safetensors). What was interrupted goes on from <name>.state.pt; the
    log beside each has what validation says of it. Raises `ValueError` for another name.
    """
    output, planned = Path(output), jobs(seeds)
    first = {
        "language_model": lambda: _language_model(output),
        "ear": lambda: hearing.build(output),
        "clips": lambda: _clips(output),
        "specialists": lambda: _specialists(output, sight),
    }
    if only is not None and only not in [*first, *planned]:
        raise ValueError(f"no {only!r} to train; there are {', '.join([*first, *planned])}")
    output.mkdir(parents=True, exist_ok=True)
    for name, make in first.items():
        if only in (None, name):
            make()
    for name, settings in planned.items():
        if only in (None, name):
            _specialist(output, name, settings, sight)
    return output


def _language_model(output):
    folder = output / models.LANGUAGE
    if Path(f"{folder}.json").exists():
        return
    state = output / f"{models.LANGUAGE}.state.pt"
    started = time.perf_counter() - spent(state)
    peft, losses = spoken.train_language_model(**LANGUAGE_MODEL, state=state)
    found = _validated(peft, spoken.Asks(build_processor()), spoken.validation(spoken.READ, ASKED))
    save(peft, None, output / models.ADAPTER, folder)
    digest = models.build_language_model(folder, output / models.ADAPTER)
    told = LANGUAGE_MODEL | {"sha256": digest, "build": models.BUILD, "validation": found}
    write_log(folder, told, losses, started)
    state.unlink(missing_ok=True)


def _clips(output):
    """Features of speech, as Whisper's encoder hears it."""
    tower = build_ear(build_tokenizer()).model.audio_tower.eval()
    for split, count in HEARD.items():
        listen(output / "clips" / split, tower, split, count, seed=0)


def _specialists(output, sight=None):
    """Build both; what a log says they are, they are built as again."""
    base = output / models.LANGUAGE
    sight = Path(sight or checkout() / "data" / "benchmark" / "smol" / models.SIGHT)
    models.folders(output, sight)
    builds = {
        "vision": lambda folder: models.build_vision(folder, base, sight),
        "speech": lambda folder: models.build_speech(folder, base),
    }
    for modality, make in builds.items():
        folder = output / "specialists" / modality
        log = Path(f"{folder}.json")
        if not log.exists():
            told = {"sha256": make(folder), "build": models.BUILD}
            log.write_text(json.dumps(told, indent=1) + "\n")


def _specialist(output, name, settings, sight):
    """One adapter and its log."""
    folder, modality = output / name, name.rpartition("/")[2]
    if Path(f"{folder}.json").exists():
        return
    _specialists(output, sight)
    base, state = output / "specialists" / modality, output / f"{name}.state.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter() - spent(state)
    given = {"clips": Clips(output / "clips" / "train")} if modality == "speech" else {}
    given |= _projector(output, name, settings)
    peft, losses = spoken.train_specialist(base, modality, **settings, **given, state=state)
    told = dict(settings)
    if not settings.get("decoupled"):
        told["validation"] = _specialist_validated(output, peft, modality)
    save(peft, None, folder, base)
    write_log(folder, told, losses, started)
    state.unlink(missing_ok=True)


def _projector(output, name, settings):
    """What it starts with: the ear's, or where it stays, that of the same seed's specialist."""
    if settings.get("decoupled"):
        return {"projector": spoken.own_projector(output / name.replace("decoupled/", ""))}
    if name.endswith("speech"):
        half = load_file(output / "ear" / "projector.safetensors")
        return {"projector": {key: weight.float() for key, weight in half.items()}}
    return {}


def _specialist_validated(output, peft, modality):
    """What it answers where its own sense is given, and where all is in words, as before."""
    processor = build_processor()
    if modality == "vision":
        items = spoken.validation(spoken.SEEN, ASKED)
        given = {"seen": spoken.Asks(processor, picture="seen")}
    else:
        clips = Clips(output / "clips" / "validation").clips
        items = [clip for some in clips.values() for clip in some[:ASKED]]
        given = {"heard": spoken.Asks(processor, voice="heard")}
    given["in words"] = spoken.Asks(processor)
    return {label: _validated(peft, asks, items) for label, asks in given.items()}


def _validated(peft, asks, items):
    return spoken.accuracy(peft.get_base_model().eval(), asks, items)
