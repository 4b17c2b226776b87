"""A merged folder pushed to the Hugging Face hub, and what is checked before the merge begins.

By huggingface_hub's `upload_folder`: where hf_xet is installed it commits as it goes and goes on
where it stopped when the same call, or `hf upload`, is made again; without, it skips the large
files that have arrived. (`upload_large_folder` is no longer there in version 2.)
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optmerge_core.checkpoints import HUB_ID
from optmerge_core.checkpoints.writer import check_output
from optmerge_core.merging.licences import (
    BASE,
    Licence,
    common,
    forbids,
    listed,
    name_of,
    read_licence,
)
from optmerge_core.study.side_files import side_files

if TYPE_CHECKING:
    from argparse import Namespace

    from optmerge_core.study.recipe import Recipe

UNCOUNTED = ".gitattributes"  # what the hub puts into a new repository


class PushError(ValueError):
    """A merge cannot be pushed, or was not; the message has the remedy."""


@dataclass(frozen=True)
class Push:
    """Where a merged folder goes on the hub, and how: `check` before the merge, `send` after it.

    A repository is made private unless `public`, and must have no files unless they are to be
    replaced (`replace`: all of them, its history keeps them). `licence` stands in the card instead
    of what the inputs' cards give; with `despite_licence` one may forbid derivatives.
    """

    repository: str
    public: bool = False
    replace: bool = False
    licence: str | None = None
    despite_licence: bool = False

    def check(self, inputs: Mapping[str, str]) -> None:
        """Raise `PushError` for whatever would stop a push after the merge.

        inputs: `BASE` and the experts -> folder, hub id or URL; of these the cards alone are read.
        """
        named = HUB_ID.fullmatch(self.repository)
        if named is None or named["revision"]:
            raise PushError(f"--push {self.repository}: give OWNER/NAME, as the hub has it")
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import HFValidationError, httpx, validate_repo_id

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise PushError(f"--push {self.repository}: {error}") from error
        if constants.HF_HUB_OFFLINE:
            raise PushError("--push needs the hub, and offline mode is on: unset HF_HUB_OFFLINE")
        if get_token() is None:
            raise PushError(
                "--push: no token of the hub; log in with `hf auth login`, or set HF_TOKEN to one "
                "that may write"
            )
        try:
            self._check_owner(HfApi().whoami())
            self._check_repository(HfApi())
            self._check_licences({name: licence_at(place) for name, place in inputs.items()})
        except (OSError, httpx.HTTPError) as error:
            raise PushError(f"--push {self.repository}: {_first_line(error)}") from error

    def send(self, folder: str | Path) -> str:
        """Push a merged folder; returns its address. It stays whole, whatever happens.

        Raises `PushError` with the command that pushes it by hand.
        """
        from huggingface_hub import HfApi, metadata_load, metadata_save

        card, api = Path(folder, "README.md"), HfApi()
        if self.licence:
            own = {k: v for k, v in (metadata_load(card) or {}).items() if "license" not in k}
            metadata_save(card, own | {"license": self.licence})
        by_hand = (
            f"push it with `{self._command(self.repository, folder)}`, which goes on where this "
            "stopped"
        )
        try:
            self._check_repository(api)  # hours may have passed
            url = api.create_repo(self.repository, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message="Upload the merge",
                delete_patterns="*" if self.replace else None,
            )  # fmt: skip
        except PushError as error:
            elsewhere = f"by hand: `{self._command('OWNER/NAME', folder)}`"
            raise PushError(f"{folder} is whole, but not pushed: {error}; {elsewhere}") from error
        except KeyboardInterrupt:
            print(f"{folder} is whole, but not pushed; {by_hand}", file=sys.stderr)
            raise
        except Exception as error:  # the library's, the network's, the storage's
            raise PushError(
                f"{folder} is whole, but not pushed ({_first_line(error)}); {by_hand}"
            ) from error
        return str(url)

    def _command(self, repository: str, folder: str | Path) -> str:
        more = ["--no-private" if self.public else "--private", *["--delete", "*"] * self.replace]
        return shlex.join(["hf", "upload", repository, str(folder), ".", *more])

    def _check_owner(self, me: Mapping[str, Any]) -> None:
        owner = self.repository.split("/")[0]
        names = [str(x.get("name")) for x in (me, *me.get("orgs", ()))]
        if owner.lower() not in [name.lower() for name in names]:
            raise PushError(
                f"--push {self.repository}: the token is {names[0]}'s, no member of {owner}; "
                f"give one of {', '.join(names)}, or log in otherwise"
            )
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PushError(
                f"--push {self.repository}: the token of {names[0]} may read, not write; make one "
                "that may at huggingface.co/settings/tokens"
            )

    def _check_repository(self, api: Any) -> None:
        """That it is new, or empty, or may be replaced, and as private as was asked for."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = api.model_info(self.repository)
        except RepositoryNotFoundError:
            return
        if bool(info.private) == self.public:
            found, remedy = ("private", "leave --public out") if self.public else ("public", "say "
                "--public")  # fmt: skip
            raise PushError(
                f"{self.repository} exists and is {found}: {remedy}, or change that in its settings"
            )
        files = [x.rfilename for x in info.siblings or () if x.rfilename != UNCOUNTED]
        if files and not self.replace:
            raise PushError(
                f"{self.repository} has {len(files)} files already ({files[0]}): choose another "
                "name, or have them replaced (--replace)"
            )

    def _check_licences(self, licences: Mapping[str, Licence]) -> None:
        from huggingface_hub import ModelCard, ModelCardData

        forbidding = {n: x for n, x in licences.items() if "derivatives" in forbids(x)}
        if forbidding and not self.despite_licence:
            raise PushError(
                f"--push {self.repository}: a merge is a derivative, which these licences forbid "
                f"({listed(forbidding)}); leave the models out, or say --despite-license if their "
                "owners have allowed it"
            )
        fields = {"license": self.licence} if self.licence else common(licences)
        if not fields:
            raise PushError(
                f"--push {self.repository}: no card of base model or experts names a licence; give "
                "the merge's own with --license, in the hub's words (apache-2.0, other, …)"
            )
        try:
            ModelCard(f"---\n{ModelCardData(**fields)}\n---\n").validate()
        except ValueError as error:
            raise PushError(
                f"--push {self.repository}: the hub does not know the licence "
                f"{name_of(fields)!r} ({_first_line(error)}); give one in its words with --license"
            ) from error


def push_of(options: Namespace, recipe: Recipe) -> Push | None:
    """Where the command line says to push a merge, if anywhere; checked before any work."""
    asked = {"--public": options.public, "--replace": options.replace}
    asked |= {"--license": options.license, "--despite-license": options.despite_license}
    if options.push is None:
        if given := [name for name, value in asked.items() if value]:
            raise PushError(f"{', '.join(given)}: only with --push OWNER/NAME")
        return None
    check_output(options.output, overwrite=options.overwrite)
    push = Push(options.push, *asked.values())
    experts = {f"expert {name}": place for name, place in recipe.experts.items()}
    push.check({BASE: recipe.base_model} | experts)
    return push


def licence_at(location: str) -> Licence:
    """Of a folder, hub id or URL, by its card alone. `CheckpointError` if the hub has no such."""
    with side_files(location, "README.md") as folder:
        return read_licence(folder)


def _first_line(error: Exception) -> str:
    """What a library said, in one line; of an error within another, both."""
    inner = error.__cause__
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{said} {_first_line(inner)}" if isinstance(inner, Exception) else said
