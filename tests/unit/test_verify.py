"""`quantize verify`: what was published, then changed by hand in every way that somebody might."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hub_fixture import TOKEN, hub_server, online
from huggingface_hub import HfApi
from published_fixture import CANDIDATE_BYTES, Publishing, write_key

from quantize import cli
from quantize.errors import SourceError, UsageError
from quantize.listing import LISTING, SIGNATURE
from quantize.progress import LineView, Progress
from quantize.provenance import RECIPE, RECORD, STATEMENT
from quantize.report.card import render_card
from quantize.report.verification import verification_text
from quantize.verify.checks import verify_place
from quantize.verify.documents import TEMPLATE, load_yaml
from quantize.verify.verification import Trust, Verification


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed publish, and beside it the key."""
    publishing = Publishing(tmp_path_factory.mktemp("publishing"))
    private, _ = write_key(publishing.root)
    publishing.run({"folder": str(publishing.root / "out"), "sign": {"key": str(private)}})
    return publishing.root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def key(made: Path) -> Path:
    return made / "signing-key.pub"


def look(place: Path | str, key: Path | None = None, **options: Any) -> Verification:
    options = {"full": False, "revision": None} | options
    revision = options.pop("revision")
    progress = Progress(LineView(lambda _line: None))
    return verify_place(str(place), revision, Trust(key), progress=progress, **options)


def outcomes(found: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in found.checks}


def failed(found: Verification) -> dict[str, list[str]]:
    """What each failed check says."""
    assert found.verified is not any(check.outcome == "failed" for check in found.checks)
    return {
        check.name: [problem.text for problem in check.problems]
        for check in found.checks
        if check.outcome == "failed"
    }


def relist(folder: Path) -> None:
    """What a careful forger does: makes listing and statement fit the files."""
    listing = json.loads((folder / LISTING).read_text())
    digests = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files_of(folder)}
    statement = json.loads((folder / STATEMENT).read_text())
    after = (STATEMENT, LISTING, SIGNATURE)
    statement["subject"] = [
        {"name": name_of(folder, path), "digest": {"sha256": digest}}
        for path, digest in sorted(digests.items())
        if name_of(folder, path) not in after
    ]
    for item in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        if item["name"] == RECORD:
            item["digest"]["sha256"] = digests[folder / RECORD]
    write(folder / STATEMENT, statement)
    listing["files"] = [
        {
            "name": name_of(folder, path),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files_of(folder)
        if name_of(folder, path) != LISTING
    ]
    write(folder / LISTING, listing)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def name_of(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_url_verifies_as_a_folder_does(folder: Path, key: Path) -> None:
    url = folder.as_uri()
    found = look(url, key)
    assert failed(found) == {}
    assert outcomes(found)["tensors"] == "skipped"
    assert outcomes(found)["signature"] == "passed"
    assert outcomes(look(url, key, full=True))["tensors"] == "passed"
    with pytest.raises(UsageError, match="--revision is for a repository"):
        look(url, revision="main")


def test_a_changed_weight_at_a_url_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert failed(look(folder.as_uri())) == {
        "files": ["model.safetensors was changed: another sha256"]
    }
    weights.unlink()
    assert failed(look(folder.as_uri()))["files"] == ["model.safetensors is missing"]


def test_a_url_without_a_publish(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no quantize/manifest\.json"):
        look(tmp_path.as_uri())


def change_one_figure(card: Path) -> tuple[str, str]:
    """Make the measured ratio of perplexities on the card a better one; before and after."""
    text = card.read_text()
    figure = next(iter(re.findall(r"\d\.\d{4}", text)))
    better = "0.9001"
    card.write_text(text.replace(figure, better, 1))
    return figure, better


def test_what_was_published_verifies(folder: Path, key: Path) -> None:
    found = look(folder, key)
    assert outcomes(found) == dict.fromkeys(
        ("files", "statement", "record", "card", "tensors", "signature"), "passed"
    )
    assert found.verified
    without = look(folder)
    assert outcomes(without)["signature"] == "skipped"
    assert "signed, not verified" in without.checks[-1].summary


# The three ways to change a figure on the card.


def test_a_changed_figure(folder: Path) -> None:
    change_one_figure(folder / "README.md")
    found = failed(look(folder))
    assert found["files"] == ["README.md was changed: another sha256"]
    assert "0.9001" in found["card"][0]


def test_a_changed_figure_with_listing_and_statement_made_to_fit(folder: Path, key: Path) -> None:
    figure, better = change_one_figure(folder / "README.md")
    relist(folder)
    found = failed(look(folder))
    assert found.keys() == {"card"}
    [line] = found["card"]
    assert figure in line and better in line and line.startswith("README.md: line ")
    assert failed(look(folder, key)).keys() == {"card", "signature"}


def test_a_changed_figure_with_everything_made_to_fit(folder: Path, key: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["compare"]["perplexity"]["ratio"] = 0.9001
    write(folder / RECORD, record)
    (folder / "README.md").write_text(render_card(record), encoding="utf-8")
    assert "0.9001" in (folder / "README.md").read_text()
    relist(folder)
    assert look(folder).verified, "nothing in the folder contradicts it"
    found = failed(look(folder, key))
    assert found.keys() == {"signature"}
    assert found["signature"] == [
        f"{SIGNATURE}: {name} was changed after it was signed"
        for name in ("README.md", STATEMENT, RECORD)
    ]


# Files.


def test_missing_added_changed_and_cut_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"l", b"L"))
    (folder / RECIPE).unlink()
    (folder / "adapter_config.json").write_text("{}")
    found = look(folder)
    [files] = [check for check in found.checks if check.name == "files"]
    assert [(problem.kind, problem.file) for problem in files.problems] == [
        ("changed", "config.json"),
        ("changed", "model.safetensors"),
        ("missing", RECIPE),
        ("added", "adapter_config.json"),
    ]
    said = failed(found)
    sizes = f"{CANDIDATE_BYTES - 1:,} bytes, not {CANDIDATE_BYTES:,}"
    assert said["files"][1] == f"model.safetensors was changed: {sizes}"
    assert "truncated" in said["tensors"][0]
    assert found.json()["checks"][0]["problems"][2]["kind"] == "missing"


def test_what_git_and_the_hubs_client_leave_is_no_change(folder: Path) -> None:
    for name in (".gitattributes", ".git/config", ".cache/huggingface/x.metadata", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not ours\n")
    assert look(folder).verified


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    elsewhere = tmp_path / "config.json"
    config.rename(elsewhere)
    config.symlink_to(elsewhere)  # the very same bytes
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    found = failed(look(folder))
    assert found["files"] == [
        "config.json is a link, which is not followed",
        "more is a link, which is not followed",
    ]


def test_weights_whose_header_lies(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"")
    with weights.open("ab") as file:
        file.write(b"!!")
    relist(folder)
    found = failed(look(folder))
    assert found.keys() == {"tensors", "record"}
    assert "its header accounts for" in found["tensors"][0]
    assert f"the weights have {CANDIDATE_BYTES + 1}" in found["record"][0]


# Statement, record, recipe.


def test_a_statement_that_says_something_else(folder: Path) -> None:
    statement = json.loads((folder / STATEMENT).read_text())
    build = statement["predicate"]["buildDefinition"]
    build["resolvedDependencies"][0]["digest"]["sha256"] = "0" * 64
    build["externalParameters"]["recipe"]["quantize"]["method"] = "gptq"
    write(folder / STATEMENT, statement)
    relist(folder)
    found = failed(look(folder))
    assert found.keys() == {"statement"}
    assert any("source instruct.digest.sha256" in line for line in found["statement"])
    assert any('quantize.method: "awq" → "gptq"' in line for line in found["statement"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made["subject"].pop(), "is not among its subjects"),
        (lambda made: made["subject"][0]["digest"].update(sha256="0" * 64), "another sha256"),
        (lambda made: made["subject"][0].update(name="x"), "x is not in the listing"),
        (lambda made: made.update(subject=[1]), "have no name and sha256"),
        (lambda made: made.update(_type="https://in-toto.io/Statement/v0.1"), "_type is"),
        (lambda made: made.update(predicate={}), "is not complete: KeyError"),
    ],
)
def test_a_statement_that_is_none(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    statement = json.loads((folder / STATEMENT).read_text())
    change(statement)
    write(folder / STATEMENT, statement)
    assert said in "\n".join(failed(look(folder))["statement"])


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 20_000, "\udcff", "a: &a [x]\nb: *a"])
@pytest.mark.parametrize("name", [STATEMENT, RECORD, RECIPE])
def test_documents_that_cannot_be_read(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    found = failed(look(folder))
    assert f"{name} was changed" in found["files"][0]
    assert "statement" in found or "record" in found


def test_a_recipe_of_aliases_is_not_built() -> None:
    """Compared with the record it would fail as well, after it has filled the memory."""
    with pytest.raises(ValueError, match="aliases"):
        load_yaml("a: &a [x, x]\nb: [*a, *a]\n")


def test_a_record_that_is_incomplete_is_no_crash(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    del record["source"], record["size"]
    write(folder / RECORD, record)
    relist(folder)
    found = failed(look(folder))
    assert found.keys() == {"statement", "record", "card"}
    assert all(
        lines[0].split(": ")[0].endswith(("is not complete", "can be made"))
        for lines in found.values()
    ), found


def test_a_recipe_that_is_not_the_records(folder: Path) -> None:
    recipe = yaml.safe_load((folder / RECIPE).read_text())
    recipe["quantize"]["method"] = "gptq"
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    statement = json.loads((folder / STATEMENT).read_text())
    statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"] = recipe
    write(folder / STATEMENT, statement)
    relist(folder)
    found = failed(look(folder))
    assert found.keys() == {"record"}
    assert 'quantize.method: "awq" → "gptq"' in found["record"][0]


def test_made_by_another_version(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["quantize"] = "9.9.9"
    write(folder / RECORD, record)
    change_one_figure(folder / "README.md")
    relist(folder)
    found = look(folder)
    assert outcomes(found)["card"] == "skipped"
    [card] = [check for check in found.checks if check.name == "card"]
    assert "9.9.9" in card.summary
    (folder / "config.json").unlink()  # checksums hold all the same
    assert failed(look(folder)).keys() == {"files"}


def test_a_template_of_a_stranger_runs_nothing(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    reach = "self.__init__.__globals__.__builtins__.open"
    template = f"{{{{ {reach}({str(canary)!r}, 'w') }}}}"
    (folder / TEMPLATE).write_text(template)
    record = json.loads((folder / RECORD).read_text())
    record["card_template"] = hashlib.sha256(template.encode()).hexdigest()
    write(folder / RECORD, record)
    relist(folder)
    found = failed(look(folder))
    assert "is unsafe" in found["card"][0]
    assert not canary.exists()


# Signatures.


def test_a_signature_of_somebody_else(folder: Path, tmp_path: Path) -> None:
    _, other = write_key(tmp_path)
    [line] = failed(look(folder, other))["signature"]
    assert "Key mismatch" in line


def test_a_signature_that_was_changed(folder: Path, key: Path) -> None:
    bundle = json.loads((folder / SIGNATURE).read_text())
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = payload[:-4] + (
        "AAAA" if payload[-4:] != "AAAA" else "BBBB"
    )
    write(folder / SIGNATURE, bundle)
    assert "signature" in failed(look(folder, key))
    (folder / SIGNATURE).write_text("no bundle")
    assert "signature" in failed(look(folder, key))


def test_a_signature_that_was_taken_away(folder: Path, key: Path) -> None:
    (folder / SIGNATURE).unlink()
    relist(folder)
    assert look(folder).verified
    assert failed(look(folder, key)) == {"signature": [f"not signed: there is no {SIGNATURE}"]}


def test_a_listing_without_a_file_that_was_signed(folder: Path, key: Path) -> None:
    (folder / "config.json").unlink()
    relist(folder)
    assert look(folder).verified
    said = failed(look(folder, key))["signature"]
    assert said[0] == f"{SIGNATURE}: config.json was removed after it was signed"


# Places that are none.


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../b", "C:/x", "a\\b", "", "./a", LISTING]
)
def test_a_listing_with_evil_names(folder: Path, name: str) -> None:
    listing = json.loads((folder / LISTING).read_text())
    listing["files"].append({"name": name, "bytes": 1, "sha256": "0" * 64})
    write(folder / LISTING, listing)
    with pytest.raises(SourceError, match="not a sound listing: it names"):
        look(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "quantize.published/1", "files": [{"name": "a"}]}',
        '{"schema": "quantize.published/1", "files": [{"name": "a", "bytes": -1, "sha256": ""}]}',
        '{"schema": "quantize.published/9", "files": []}',
        "[" * 100_000,
    ],
)
def test_a_listing_that_is_none(folder: Path, text: str) -> None:
    (folder / LISTING).write_text(text)
    with pytest.raises(SourceError, match="not a sound listing"):
        look(folder)


def test_places_that_were_not_published(folder: Path, tmp_path: Path) -> None:
    (folder / LISTING).unlink()
    with pytest.raises(SourceError, match=r"has no quantize/manifest\.json"):
        look(folder)
    with pytest.raises(UsageError, match="is a file"):
        look(folder / "README.md")
    with pytest.raises(UsageError, match="neither a folder nor"):
        look(tmp_path / "absent")
    with pytest.raises(UsageError, match="--revision is for a repository"):
        look(folder, revision="main")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": Path("k"), "identity": "a", "issuer": "b"}, "two ways"),
        ({"key": None, "identity": "a", "issuer": None}, "belong together"),
        ({"key": None, "identity": None, "issuer": "b"}, "belong together"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Trust.of(**options)


def test_a_key_that_is_none(folder: Path, made: Path) -> None:
    with pytest.raises(SourceError, match="cannot read the key"):
        look(folder, made / "absent.pub")
    with pytest.raises(SourceError, match="no public key"):
        look(folder, made / "signing-key.pem")


# The Hub.


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    online(monkeypatch)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        publishing = Publishing(tmp_path)
        private, _ = write_key(tmp_path)
        publishing.run({"hub": {"repo": "ann/tiny"}, "sign": {"key": str(private)}})
        yield server, HfApi(server.endpoint, TOKEN)


def test_a_repository(on_the_hub: Any, tmp_path: Path) -> None:
    server, api = on_the_hub
    key = tmp_path / "signing-key.pub"
    head = api.model_info("ann/tiny").sha
    read = server.count(r"/resolve/.*\.safetensors")  # when it was published
    found = look("ann/tiny", key)
    assert (found.verified, found.commit) == (True, head)
    assert outcomes(found)["tensors"] == "skipped"
    assert server.count(r"/resolve/.*\.safetensors") == read
    full = look("ann/tiny", key, full=True)
    assert set(outcomes(full).values()) == {"passed"}
    assert server.count(r"/resolve/.*\.safetensors") > read

    api.upload_file(path_or_fileobj=b"other", path_in_repo="config.json", repo_id="ann/tiny")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.safetensors", repo_id="ann/tiny")
    api.delete_file("README.md", "ann/tiny")
    said = failed(look("ann/tiny", key))
    assert said["files"] == [
        "README.md is missing",
        f"config.json was changed: 5 bytes, not {len(json.dumps({'model_type': 'llama'})) + 4}",
        "x.safetensors was added: it is not in the listing",
    ]
    assert "signature" in said
    assert look("ann/tiny", key, revision=head).verified


def test_a_repository_that_is_not_there(on_the_hub: Any) -> None:
    with pytest.raises(SourceError, match="404"):
        look("ann/absent")
    with pytest.raises(SourceError, match="404"):
        look("ann/tiny", revision="no-such-branch")


# The command.


def test_the_command(folder: Path, key: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(cli.main, ["verify", str(folder), "--key", str(key)])
    assert (done.exit_code, done.output.splitlines()[-1].strip()) == (0, "verified")
    change_one_figure(folder / "README.md")
    command = [sys.executable, "-m", "quantize", "verify", str(folder), "--json"]
    machine = subprocess.run(command, capture_output=True, text=True, check=False)
    assert machine.returncode == 3
    found = json.loads(machine.stdout)
    assert found["verified"] is False
    assert [check["name"] for check in found["checks"] if check["outcome"] == "failed"] == [
        "files",
        "card",
    ]
    (folder / LISTING).unlink()
    gone = subprocess.run(command[:-1], capture_output=True, text=True, check=False)
    assert (gone.returncode, gone.stdout) == (3, "")
    assert gone.stderr.startswith("error: ") and "next: " in gone.stderr


def test_names_of_a_stranger_write_no_control_characters(folder: Path) -> None:
    (folder / "\x1b[31mred\r\nverified").write_text("")
    text = verification_text(look(folder))
    assert "red verified was added" in text
    assert "\x1b[31mred" not in text and text.rstrip().endswith("does not verify: files")


def test_a_version_of_a_stranger_writes_no_control_characters(folder: Path) -> None:
    """It is shown of checks that pass or are skipped, where no problem is."""
    record = json.loads((folder / RECORD).read_text())
    record["quantize"] = "\x1b[31m9.9.9\u202e"
    write(folder / RECORD, record)
    relist(folder)
    text = verification_text(look(folder))
    assert "9.9.9" in text
    assert not set(text) & set("\x1b\u202e")
