"""What `quantize plan` shows, and what is refused before a run: on Llama 3.1 70B's shapes."""

import json
import re
import shutil
from pathlib import Path

import llama_70b
import psutil
import pytest
from click.testing import CliRunner
from llama_70b import KINDS, recipe

from quantize import machine
from quantize.capacity.from_config import CONFIGS, known_config, tensors_of
from quantize.cli import main
from quantize.errors import RecipeError
from quantize.recipe_file import load_recipe
from quantize.resource_checks import check_resources
from quantize.resources import shipped_root


def findings(*changes: str, accelerator: str = "cpu", kinds: set[str] = KINDS) -> list[str]:
    found = check_resources(llama_70b.checkpoint(), recipe(*changes), Path(), kinds, accelerator)
    return [f"{one.message} → {one.hint}" for one in found]


def enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": 10**12})())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 10**12})())


def test_a_70b_does_not_fit_a_24_gb_card(monkeypatch: pytest.MonkeyPatch) -> None:
    enough(monkeypatch)
    alone = ("machine.gpu=RTX 4090", "machine.gpus=1", "serve.tensor_parallel_size=1")
    baseline, candidate = findings(*alone)
    assert "measure-baseline needs 151.8 GB of GPU memory (the weights 141.1 GB" in baseline
    assert "RTX 4090 has 24.0 GB (of which vLLM takes 21.6 GB)" in baseline
    assert "set serve.tensor_parallel_size to 8 on a machine with 8 such GPUs" in baseline
    assert "the KV cache of one request of 32,768 tokens 10.7 GB" in candidate
    assert "set serve.tensor_parallel_size to 4" in candidate
    assert findings(*alone, kinds={"compress"}) == []
    (only,) = findings(*alone, kinds={"measure", "measure-candidate"})
    assert only == candidate  # the baseline was measured elsewhere
    assert findings(*alone, "serve.extra_args=['--cpu-offload-gb=200']") == []
    window = llama_70b.checkpoint(sliding_window=4096)  # its cache is smaller than computed
    h100 = recipe("machine.gpu=H100", "serve.tensor_parallel_size=1", "serve.max_model_len=131072")
    assert len(check_resources(window, h100, Path(), {"measure", "measure-candidate"}, "cpu")) == 0
    large = check_resources(
        llama_70b.checkpoint(), h100, Path(), {"measure", "measure-candidate"}, "cpu"
    )
    assert len(large) == 1  # 43 GB of cache
    assert findings("machine.gpu=H100", "machine.gpus=4") == []
    (few,) = {text.partition(" serves on ")[2] for text in findings("machine.gpu=H100")}
    assert few.startswith("4 GPUs, the machine has 1 (H100) → set serve.tensor_parallel_size to 1")
    with pytest.raises(RecipeError, match=r"machine.gpu: no card 'H1000' .* H200"):
        findings("machine.gpu=H1000")


def test_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    enough(monkeypatch)
    monkeypatch.setattr("quantize.resource_checks.gpus", lambda: [("NVIDIA L40S", 48 * 10**9)] * 4)
    assert findings(accelerator="cuda", kinds={"measure"}) == []
    assert "L40S has 48.0 GB" in findings("serve.tensor_parallel_size=1", accelerator="cuda")[0]
    assert findings("serve.tensor_parallel_size=8", accelerator="cuda") != []
    assert findings(accelerator="cpu") == []


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus() == [("NVIDIA H100 80GB HBM3", 81559 << 20)]
    assert machine.device_name("cuda") == "1 × NVIDIA H100 80GB HBM3, 81559 MiB"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.gpus() == [] and machine.device_name("cuda") == "CUDA GPU"


def test_memory_and_disk_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enough(monkeypatch)
    assert findings("serve.tensor_parallel_size=1") == []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": 100 * 10**9})())
    (memory,) = findings()
    assert "measure-baseline needs 141.1 GB of memory (the weights 141.1 GB)" in memory
    assert len(findings("quantize.engine=llmcompressor")) == 2
    enough(monkeypatch)
    published = (f"publish.folder={tmp_path / 'out'}",)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 80 * 10**9})())
    assert findings(*published) == []
    found = check_resources(
        llama_70b.checkpoint(), recipe(*published), tmp_path, {*KINDS, "publish"}, "cpu"
    )
    assert len(found) == 1 and "114" in found[0].message  # the copy is on the same file system
    hub = check_resources(
        llama_70b.checkpoint(), recipe(), Path(), KINDS, "cpu", downloads=("fetch",)
    )
    assert "this run writes about 215" in hub[0].message
    packed = check_resources(llama_70b.checkpoint(), recipe(), Path(), KINDS, "cpu")
    unpacked = check_resources(llama_70b.checkpoint(), recipe(), Path(), KINDS, "cpu", unpacks=True)
    assert packed == [] and "this run writes about 215" in unpacked[0].message
    gpu = recipe("machine.gpu=H100", "machine.gpus=4")  # which takes packed weights
    assert check_resources(llama_70b.checkpoint(), gpu, Path(), KINDS, "cpu", unpacks=True) == []
    # a local fine-tune, and its base on the Hub
    kinds, base = {*KINDS, "fetch-base"}, ("fetch-base",)
    one = check_resources(llama_70b.checkpoint(), recipe(), Path(), kinds, "cpu", downloads=base)
    assert "this run writes about 215" in one[0].message


def test_plan_shows_the_figures(tmp_path: Path) -> None:
    options = ["--store", str(tmp_path), "--price-per-hour", "2", "--tokens-per-second", "L4=500"]
    done = CliRunner().invoke(main, ["plan", "tiny-llama-awq", *options])
    assert done.exit_code == 0, done.output
    rows = {row[0]: row for line in done.output.splitlines() if (row := line.split())}
    assert rows["L4"][-1] == "1.11" and rows["H100"][-1] == "-"
    assert "needs (computed), on a CPU" in done.output and "cards (computed)" in done.output
    assert "uneven: heads or groups" in done.output and "no: the weights" not in done.output
    done = CliRunner().invoke(main, ["plan", "tiny-llama-awq", "--json", *options])
    found = json.loads(done.output)["needs"]
    assert found["cards"][3]["per_million_tokens"] == pytest.approx(2 / 1.8)
    compress = next(one for one in found["stages"] if one["id"] == "compress")
    assert compress["host"]["bytes"] == sum(p["bytes"] for p in compress["host"]["parts"])
    assert compress["seconds"] is None and compress["cost"] is None


def test_plan_of_a_checkpoint_that_is_not_here(tmp_path: Path) -> None:
    given = tmp_path / "recipe.yaml"
    shipped = (shipped_root() / "recipes" / "llama3-70b-awq.yaml").read_text()
    given.write_text(shipped.replace("source: meta-llama/Llama-3.3", "source: someone/Llama-3.3"))
    store = ["--store", str(tmp_path / "store")]
    done = CliRunner().invoke(main, ["plan", str(given), *store])
    assert done.exit_code == 0, done.output
    assert "note: needs: the checkpoint is not here yet: figures come" in done.output
    config = tmp_path / "config.json"
    config.write_text(json.dumps(llama_70b.CONFIG))
    for arguments in (["llama3-70b-awq"], [str(given), "--config", str(config)]):
        done = CliRunner().invoke(main, ["plan", *arguments, *store])
        rows = {row[0]: row for line in done.output.splitlines() if (row := line.split())}
        assert "fetch               500 MB    -   141 GB" in done.output
        assert "RTX 6000 Ada             48 GB  yes        4        (4.37k)" in done.output
        assert rows["H200"] == ["H200", "141", "GB", "yes", "2", "259k", "640k", "1.40M", "2.92M"]
    config.write_text('{"architectures": ["OtherForCausalLM"]}')
    done = CliRunner().invoke(main, ["plan", str(given), *store, "--config", str(config)])
    assert done.exit_code == 2 and "no shapes are known" in done.output


def test_known_configs_are_those_of_the_shipped_recipes() -> None:
    recipes = [
        path for path in (shipped_root() / "recipes").glob("*.yaml") if "tiny" not in path.name
    ]
    sources = {load_recipe(path, ()).model.source for path in recipes}
    assert sources == set(json.loads(CONFIGS.read_text()))
    counted = {"Llama-3.3-70B": 70_553_706_496, "Llama-3.1-8B": 8_030_261_248}
    counted |= {"Qwen3-4B": 4_022_468_096, "Mistral-Small-24B": 23_572_403_200}  # by the Hub
    for name, parameters in counted.items():
        config = known_config(next(source for source in sources if name in source))
        assert config is not None
        tensors = tensors_of(config)
        assert tensors is not None
        assert sum(info.elements for info in tensors.values()) == parameters, name


@pytest.mark.parametrize(
    ("option", "said"), [("x", "not a number"), ("-1", "not a number"), ("Z9=2", "no card 'Z9'")]
)
def test_options_that_are_no_numbers(option: str, said: str, tmp_path: Path) -> None:
    arguments = ["plan", "tiny-llama-awq", "--store", str(tmp_path), f"--price-per-hour={option}"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert said in re.sub(r"\s+", " ", done.output)


def test_plan_says_which_machine_and_which_cards_have_no_kernel(tmp_path: Path) -> None:
    machine = ["--set", "machine.gpu=L40S", "--set", "machine.gpus=2"]
    arguments = ["plan", "tiny-llama-int8", "--store", str(tmp_path), *machine]
    done = CliRunner().invoke(main, arguments)
    assert "needs (computed), on 2 × L40S" in done.output
    rows = {row[0]: row for line in done.output.splitlines() if (row := line.split())}
    assert rows["B200"][-4:] == ["kernel"] * 4 and "kernel" not in rows["H200"]
    assert "kernel: vLLM has none for the scheme" in done.output
    done = CliRunner().invoke(main, ["plan", "llama3-70b-awq", *arguments[2:]])
    assert re.search(r"in all +357 GB", done.output)  # source, base, result, hidden states
