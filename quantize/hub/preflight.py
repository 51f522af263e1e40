"""Before any work: may we publish to this repository on the Hub, and will the result fit there?

The Hub tells nobody how much storage an account has left, so that a full one shows at the upload.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from quantize.errors import QuantizeError, SourceError, TransientError
from quantize.findings import Finding
from quantize.hub.client import Access
from quantize.hub.refs import check_collection, check_tag
from quantize.hub.repository import require_write
from quantize.hub.target import (
    VISIBILITIES,
    Limit,
    Target,
    check_visibility,
    read_branch,
    read_small_file,
    read_visibility,
    refuse_files_of_others,
)
from quantize.stages.base import Resolved
from quantize.targets import Hub

PUBLISHED_RECIPE = "quantize/recipe.yaml"


def target_of(access: Access, resolved: Resolved, hub: Hub) -> Target:
    """The recipe's target, with the limit that its sources set to how open it may be."""
    return Target(
        hub.repo,
        hub.branch,
        hub.private,
        hub.pull_request,
        hub.tag,
        hub.collection,
        source_limit(access, resolved, hub),
    )


def source_limit(access: Access, resolved: Resolved, hub: Hub) -> Limit | None:
    """How open the target may be: no more than its least open source; None for any.

    A source on the Hub that cannot be read any more counts as private. Of a local one nobody knows
    whether it is public, so that `private: false` must say it.
    """
    if hub.allow_public:
        return None
    limits = []
    model = resolved.recipe.model
    for key, name, source in (
        ("source", "model", model.source),
        ("adapter", "adapter", model.adapter),
    ):
        if source is None:
            continue
        if name in resolved.paths:
            if hub.private:
                reason = f"publish.hub.private is true, and model.{key} is a local folder"
                limits.append(Limit("private", reason))
        else:
            visibility = read_visibility(access, source)
            said = visibility or "not there any more, or not for this token: it counts as private"
            limits.append(Limit(visibility or "private", f"model.{key} {source} is {said}"))
    return min(limits, key=lambda limit: VISIBILITIES.index(limit.visibility), default=None)


def check_hub(
    access: Access, resolved: Resolved, hub: Hub, recipe_text: Callable[[], str]
) -> list[Finding]:
    """Token, permission, visibility, files of others, tag and collection.

    `recipe_text` gives `quantize/recipe.yaml` as it would be published. TransientError when the
    Hub does not answer.
    """
    findings: list[Finding] = []

    def check(action: Callable[[], object]) -> bool:
        try:
            action()
        except TransientError:
            raise
        except QuantizeError as error:
            findings.append(Finding.of(error))
            return False
        return True

    if not check(lambda: require_write(access, hub.repo, pull_request=hub.pull_request)):
        return findings
    target = target_of(access, resolved, hub)
    check(lambda: _check_repository(access, target))
    if hub.tag is not None:
        check(lambda: _check_tag(access, target, recipe_text))
    if hub.collection is not None:
        slug = hub.collection
        check(lambda: check_collection(access, slug, hub.repo))
    return findings


def _check_repository(access: Access, target: Target) -> None:
    """What is there already, or would be created, may be seen by no more people than allowed."""
    visibility = read_visibility(access, target.repo)
    check_visibility(target, visibility)
    if visibility is None:
        if target.pull_request:
            require_write(access, target.repo)  # the repository must be created first
        return
    branch = read_branch(access, target)
    if branch is not None:
        refuse_files_of_others(target, branch, frozenset())


def _check_tag(access: Access, target: Target, recipe_text: Callable[[], str]) -> None:
    """ConflictError when the tag is on a commit that another recipe made, or none of ours.

    Whether the files are the same as well shows when they are there.
    """
    assert target.tag is not None
    wanted = yaml.safe_load(recipe_text())

    def made_by_this_recipe(commit: str) -> bool:
        try:
            text = read_small_file(access, target.repo, commit, PUBLISHED_RECIPE)
            return bool(yaml.safe_load(text) == wanted)
        except (SourceError, yaml.YAMLError):  # SourceError: it has no such file
            return False

    if read_visibility(access, target.repo) is not None:
        check_tag(access, target.repo, target.tag, None, made_by_this_recipe)
