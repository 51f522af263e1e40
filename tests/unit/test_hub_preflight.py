"""Before any GPU work: what the Hub says of token, target, visibility, tag and collection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_fixture import (
    CONTENTS,
    SCOPED_TOKEN,
    TARGET,
    TOKEN,
    access,
    hub_server,
    online,
    publish,
    repository,
)

from quantize.errors import ConflictError, CredentialsError, QuantizeError, UsageError
from quantize.findings import Finding
from quantize.hub.preflight import check_hub, source_limit
from quantize.hub.repository import require_write
from quantize.hub.target import Limit
from quantize.publication import recipe_as_published
from quantize.quantization import Quantize
from quantize.recipe import Model, Recipe
from quantize.stages.base import Resolved
from quantize.targets import Hub, Publish
from tests.hub_server import Account, HubServer
from tests.hub_server.repos import File

SOURCE = "ann/fine-tuned"


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def resolved(hub: Hub, *, local: bool = False, bits: str = "W4A16") -> Resolved:
    source = "../checkpoint" if local else SOURCE
    made = Recipe(
        version=1,
        name="tiny-awq",
        model=Model(source=source),
        quantize=Quantize(method="rtn", scheme=bits),  # type: ignore[arg-type]
        publish=Publish(hub=hub),
    )
    paths = {"model": Path("/somewhere/checkpoint")} if local else {}
    return Resolved(made, Path("/"), "cpu", digests={}, paths=paths)


def target(**values: Any) -> Hub:
    return Hub(**{"repo": TARGET.repo} | values)


def check(server: HubServer, hub: Hub, token: str = TOKEN, **values: Any) -> list[Finding]:
    given = resolved(hub, **values)
    return check_hub(access(server, token), given, hub, lambda: recipe_as_published(given))


def source(server: HubServer, *, private: bool = False, gated: str | bool = False) -> None:
    server.hub.create("model", SOURCE, private=private).gated = gated


def only(findings: list[Finding], error: type[QuantizeError]) -> str:
    [finding] = findings
    assert finding.error is error
    assert finding.hint
    return finding.message


def test_a_target_that_is_not_there_yet_is_fine() -> None:
    with hub_server() as server:
        source(server)
        assert check(server, target()) == []
        assert check(server, target(tag="v1", branch="dev", pull_request=False)) == []
        assert TARGET.repo not in [name for _, name in server.hub.repos]


def test_a_target_of_ours_is_fine(tmp_path: Path) -> None:
    with hub_server() as server:
        source(server)
        publish(server, tmp_path)
        assert check(server, target()) == []
        assert server.count("POST .*/commit/") == 1


def test_files_of_others_are_found_before_any_work() -> None:
    with hub_server() as server:
        source(server)
        repo = server.hub.create("model", TARGET.repo, private=True)
        repo.commit("main", {"model.safetensors": File(b"bf16", lfs=True)}, "theirs")
        message = only(check(server, target()), ConflictError)
        assert "did not publish: model.safetensors" in message


@pytest.mark.parametrize(
    ("private", "gated", "asked", "existing", "refused"),
    [
        (True, False, {"private": False}, None, "would be public, but model.source .* is private"),
        (True, False, {"private": True}, "public", "is public, but model.source .* is private"),
        (False, "auto", {"private": False}, None, "would be public, but .* is gated"),
        (True, False, {"private": True}, None, None),
        (True, False, {"private": True}, "private", None),
        (False, False, {"private": True}, "public", None),
        (False, False, {"private": False}, None, None),
        (True, False, {"private": False, "allow_public": True}, None, None),
        (True, False, {"private": True, "allow_public": True}, "public", None),
    ],
)
def test_a_source_goes_to_no_target_that_more_people_see(
    private: bool, gated: str | bool, asked: dict, existing: str | None, refused: str | None
) -> None:
    with hub_server() as server:
        source(server, private=private, gated=gated)
        if existing is not None:
            server.hub.create("model", TARGET.repo, private=existing == "private")
        findings = check(server, target(**asked))
        if refused is None:
            assert findings == []
        else:
            [finding] = findings
            with pytest.raises(ConflictError, match=refused):
                raise finding.error(finding.message)
            assert "allow_public" in finding.hint


@pytest.mark.parametrize(("private", "allowed"), [(True, False), (False, True)])
def test_a_local_source_goes_public_only_when_the_recipe_says_so(
    private: bool, allowed: bool
) -> None:
    with hub_server() as server:
        server.hub.create("model", TARGET.repo, private=False)
        findings = check(server, target(private=private), local=True)
        if allowed:
            assert findings == []
        else:
            assert "model.source is a local folder" in only(findings, ConflictError)


def test_a_source_that_cannot_be_read_counts_as_private() -> None:
    with hub_server() as server:
        hub = target()
        limit = source_limit(access(server), resolved(hub), hub)
        assert limit is not None
        assert limit.visibility == "private"


def test_a_target_that_became_public_meanwhile_gets_nothing(tmp_path: Path) -> None:
    with hub_server() as server:
        source(server, private=True)
        hub = target()
        limit = source_limit(access(server), resolved(hub), hub)
        server.hub.create("model", TARGET.repo, private=False)
        server.seen.clear()
        with pytest.raises(ConflictError, match="is public, but"):
            publish(server, tmp_path, target=replace(TARGET, limit=limit))
        assert server.count("^(PUT|POST) ") == 0


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_is_created_that_more_people_would_see(tmp_path: Path, exists: bool) -> None:
    limit = Limit("private", "the source is private")
    with hub_server() as server:
        if exists:
            server.hub.create("model", TARGET.repo, private=False)
        open_target = replace(TARGET, private=exists, branch="dev", limit=limit)
        with pytest.raises(ConflictError, match=r"(is|would be) public, but the source"):
            publish(server, tmp_path, target=open_target)
        assert [list(repo.branches) for repo in server.hub.repos.values()] == [["main"]] * exists


@pytest.mark.parametrize("same", [True, False])
def test_a_tag_of_another_recipe_is_found_before_any_work(tmp_path: Path, same: bool) -> None:
    hub = target(tag="v1")
    with hub_server() as server:
        source(server)
        text = recipe_as_published(resolved(hub, bits="W4A16" if same else "W8A16"))
        contents = {**CONTENTS, "quantize/recipe.yaml": text.encode()}
        commit = publish(server, tmp_path, contents, replace(TARGET, tag="v1")).commit
        findings = check(server, hub)
        if same:
            assert findings == []
        else:
            assert commit in only(findings, ConflictError)


def test_a_tag_on_something_else_is_found_before_any_work() -> None:
    with hub_server() as server:
        source(server)
        repo = server.hub.create("model", TARGET.repo, private=True)
        repo.tags["v1"] = repo.branches["main"]
        assert "tag v1 of ann/tiny-awq is on" in only(
            check(server, target(tag="v1")), ConflictError
        )


def test_a_collection_must_be_there() -> None:
    with hub_server() as server:
        source(server)
        slug = server.hub.create_collection("Small", "ann").slug
        assert check(server, target(collection=slug)) == []
        findings = check(server, target(collection="ann/none-0"))
        assert "no collection ann/none-0" in only(findings, UsageError)


def test_a_pull_request_needs_less_permission() -> None:
    with hub_server() as server:
        server.hub.accounts["hf_guest"] = Account("guest")
        source(server)
        hub = target(pull_request=True)
        assert "may not write to ann" in only(check(server, hub, "hf_guest"), CredentialsError)
        server.hub.create("model", TARGET.repo, private=False)
        assert check(server, hub, "hf_guest") == []
        assert "may not write" in only(check(server, target(), "hf_guest"), CredentialsError)


@pytest.mark.parametrize(
    ("granted", "allowed"), [(["discussion.write"], True), (["repo.content.read"], False)]
)
def test_fine_grained_tokens_for_pull_requests(granted: list[str], allowed: bool) -> None:
    scope = {"entity": {"type": "org", "name": "lab"}, "permissions": granted}
    with hub_server() as server:
        server.hub.accounts[SCOPED_TOKEN] = Account("ann", role="fineGrained", scopes=(scope,))
        scoped = access(server, SCOPED_TOKEN)
        with pytest.raises(CredentialsError, match="fine-grained"):
            require_write(scoped, "lab/x")
        if allowed:
            assert require_write(scoped, "lab/x", pull_request=True) == "ann"
        else:
            with pytest.raises(CredentialsError, match="fine-grained"):
                require_write(scoped, "lab/x", pull_request=True)


def test_the_published_recipe_is_the_one_that_is_compared() -> None:
    values = yaml.safe_load(recipe_as_published(resolved(target(), local=True)))
    assert values["model"]["source"] == "checkpoint"
    assert "publish" not in values


def test_everything_is_reported_together() -> None:
    with hub_server() as server:
        source(server, private=True)
        repo = server.hub.create("model", TARGET.repo, private=False)
        repo.tags["v1"] = repo.branches["main"]
        errors = [f.error for f in check(server, target(tag="v1", collection="ann/none-0"))]
        assert errors == [ConflictError, ConflictError, UsageError]
        assert repository(server).messages == ["initial commit"]
