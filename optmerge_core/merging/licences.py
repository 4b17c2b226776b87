"""What base model and experts may be used for, by the front matter of their own model cards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import yaml

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.weights import Weights

Licence = dict[str, str]
"""license, license_name and license_link, as far as a card has them; empty where it names none"""
FORBIDDEN = {
    "derivatives": re.compile(r"(?:^|[-_ ])nd(?:[-_ ]|$)|no-?deriv", re.IGNORECASE),
    "commercial use": re.compile(r"(?:^|[-_ ])nc(?:[-_ ]|$)|non-?commercial", re.IGNORECASE),
}
"""What a licence may forbid -> how its name says so, as in cc-by-nc-nd-4.0; no text is read."""
BASE = "base model"


def read_licence(folder: Path | None) -> Licence:
    """That of the README.md in a folder; empty where there is none that can be read."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    from huggingface_hub import metadata_load  # slow, and most local folders have no card

    try:
        found = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return licence_of(found)


def licence_of(front_matter: Mapping[str, object]) -> Licence:
    """Of a card's front matter; several licences are one name, `a and b`."""
    given = front_matter.get("license")
    if isinstance(given, list):
        given = " and ".join(map(str, given))
    if not isinstance(given, str) or not given.strip():
        return {}
    fields = {"license": given.strip()}
    for key in ("license_name", "license_link"):
        value = front_matter.get(key)
        if isinstance(value, str) and value.strip():
            fields[key] = value.strip()
    return fields


def name_of(licence: Licence) -> str:
    """What a licence is called; "" for none."""
    given = licence.get("license", "")
    return licence.get("license_name", given) if given == "other" else given


def forbids(licence: Licence) -> list[str]:
    """What the licence's name says it forbids: derivatives, commercial use."""
    return [what for what, pattern in FORBIDDEN.items() if pattern.search(name_of(licence))]


def common(licences: Mapping[str, Licence]) -> Licence:
    """A merged model's card: the licence of all that name one, "other" where these differ."""
    named = {name_of(licence).lower(): licence for licence in licences.values() if licence}
    if len(named) != 1:
        return {"license": "other"} if named else {}
    fields = dict(next(iter(named.values())))
    links = {licence.get("license_link", "") for licence in licences.values() if licence}
    if len(links) > 1 or not all(map(URL.match, links)):  # a file of the model's own repository
        fields.pop("license_link", None)
    return fields


def remarkable(licences: Mapping[str, Licence]) -> bool:
    """Whether those that are named differ, or one forbids something."""
    named = {name_of(licence).lower() for licence in licences.values() if licence}
    return len(named) > 1 or any(map(forbids, licences.values()))


def listed(licences: Mapping[str, Licence]) -> str:
    """`base model: apache-2.0; ocr: cc-by-nc-4.0 (forbids commercial use); vqa: none named`."""
    return "; ".join(
        f"{owner}: {name_of(licence) or 'none named'}"
        + f" (forbids {' and '.join(forbids(licence))})" * bool(forbids(licence))
        for owner, licence in licences.items()
    )


def tell_licences(base: Weights | None, experts: Mapping[str, Weights]) -> None:
    """Warn where the licences that the cards name are not one, or forbid something."""
    folders = {} if base is None else {BASE: base.folder}
    folders |= {f"expert {name}": expert.folder for name, expert in experts.items()}
    licences = {owner: read_licence(folder) for owner, folder in folders.items()}
    if remarkable(licences):
        warnings.warn(
            f"licences, by the models' own cards: {listed(licences)}; the card names them all",
            stacklevel=3,
        )
