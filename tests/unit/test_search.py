"""Search: a strict record, a choice that is an optimum, a recipe that says what was chosen."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sensitivity_fixture import SHAPES, choice_of, record

from quantize.errors import ToolError, UsageError
from quantize.mixed_recipe import mixed_recipe, patterns
from quantize.modules import matches, served_unit
from quantize.recipe_file import load_recipe
from quantize.report.frontier import frontier_json, frontier_table
from quantize.report.tables import render
from quantize.search import (
    Budget,
    Found,
    best,
    choose,
    frontier,
    parse_budget,
    search,
    smallest,
    solve,
    uniform,
)
from quantize.sensitivity import BF16, Choice, Option, Sensitivity, Unit, read_sensitivity, units
from tests.end_to_end.conftest import ROOT


def read(value: dict[str, Any]) -> Sensitivity:
    return read_sensitivity(json.dumps(value), "sensitivity.json")


def problem(
    schemes: Sequence[str] = ("W4A16_ASYM", "W8A16", "BF16"), **how: Any
) -> tuple[Unit, ...]:
    return units(read(record(**how)), schemes, lambda name: False)


class TestRecord:
    def test_units_join_what_is_served_as_one(self) -> None:
        among = problem()
        assert [len(unit.linears) for unit in among[:4]] == [1, 2, 1, 3]
        qkv = next(unit for unit in among if unit.name == "model.layers.0.self_attn.qkv")
        raw = record()["linears"][:3]
        assert qkv.parameters == sum(math.prod(linear["shape"]) for linear in raw)
        least = qkv.options[0]
        assert least.choice == Choice("W4A16_ASYM", 128)
        assert least.bytes == sum(linear["candidates"][0]["bytes"] for linear in raw)
        assert least.error == pytest.approx(sum(li["candidates"][0]["error"] for li in raw))

    @pytest.mark.parametrize("key", ["name", "layer", "unit", "shape", "candidates"])
    def test_a_missing_value_is_an_error(self, key: str) -> None:
        value = record()
        del value["linears"][3][key]
        with pytest.raises(ToolError, match=rf"linears\.3\.{key}"):
            read(value)

    @pytest.mark.parametrize("key", ["scheme", "group_size", "bytes", "error"])
    def test_a_missing_value_of_a_candidate_is_an_error(self, key: str) -> None:
        value = record()
        del value["linears"][0]["candidates"][1][key]
        with pytest.raises(ToolError, match=key):
            read(value)

    @pytest.mark.parametrize(
        ("key", "wrong"),
        [("error", math.nan), ("error", -0.1), ("error", None), ("bytes", 0), ("bytes", 1.5)],
    )
    def test_a_wrong_value_is_an_error(self, key: str, wrong: object) -> None:
        value = record()
        value["linears"][0]["candidates"][0][key] = wrong
        with pytest.raises(ToolError, match=key):
            read(value)

    def test_bf16_is_always_there_and_names_differ(self) -> None:
        value = record()
        del value["linears"][0]["candidates"][-1]
        with pytest.raises(ToolError, match="BF16"):
            read(value)
        value = record()
        value["linears"].append(value["linears"][0])
        with pytest.raises(ToolError, match="twice"):
            read(value)

    def test_a_choice_must_be_there_for_every_linear_of_the_unit(self) -> None:
        value = record()
        del value["linears"][1]["candidates"][1]  # k_proj has no groups of 32
        among = units(read(value), ("W4A16_ASYM", "BF16"), lambda name: False)
        qkv = next(unit for unit in among if unit.name == "model.layers.0.self_attn.qkv")
        assert [o.choice for o in qkv.options] == [Choice("W4A16_ASYM", 128), BF16]
        assert Choice("W4A16_ASYM", 32) not in uniform(among)

    def test_what_the_recipe_ignores_is_no_part_of_it(self) -> None:
        among = units(read(record()), ("W8A16", "BF16"), lambda name: name.endswith("down_proj"))
        assert not any(name.endswith("down_proj") for unit in among for name in unit.linears)
        with pytest.raises(UsageError, match="every linear"):
            units(read(record()), ("BF16",), lambda name: True)

    def test_a_scheme_that_was_not_measured(self) -> None:
        with pytest.raises(UsageError, match="MXFP4A16 was measured"):
            problem(("MXFP4A16",))


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[tuple[Unit, ...], int]:
    """Up to six units with up to four options of any size, and a budget that something fits."""
    scale = draw(st.sampled_from([1, 16, 10_007, 2**26]))
    among = []
    for index in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 4))
        options = [
            Option(
                Choice("W4A16", 32 * (k + 1)),
                draw(st.integers(1, 40)) * scale,
                draw(st.floats(0, 1, allow_subnormal=False)),
            )
            for k in range(count)
        ]
        options.sort(key=lambda option: option.order)
        among.append(Unit(f"u{index}", (f"m.{index}.x",), 1000, tuple(options)))
    low = sum(unit.options[0].bytes for unit in among)
    return tuple(among), low + draw(st.integers(0, 120 * scale))


class TestOptimum:
    @given(small_problems())
    def test_no_other_choice_is_better(self, given_: tuple[tuple[Unit, ...], int]) -> None:
        among, budget = given_
        least = min(
            math.fsum(option.error for option in options)
            for options in itertools.product(*(unit.options for unit in among))
            if sum(option.bytes for option in options) <= budget
        )
        found = solve(among, budget)
        assert found.bytes <= budget
        assert found.bytes == sum(found.options[unit.name].bytes for unit in among)
        assert found.error == pytest.approx(least, rel=1e-8, abs=1e-9)

    def test_a_tight_budget_of_large_numbers_is_kept_to_the_byte(self) -> None:
        # Each step up costs 10**9 bytes and one: the solver's own tolerance is hundreds.
        among = tuple(
            Unit(
                f"u{i}",
                (f"m.{i}.x",),
                10**9,
                (
                    Option(Choice("W4A16", 128), 10**9 + i, 1.0 + i / 100),
                    Option(BF16, 2 * 10**9 + 2 * i + 1, 0.0),
                ),
            )
            for i in range(8)
        )
        low = smallest(among).bytes
        room = sum(10**9 + i + 1 for i in (7, 6, 5))
        assert solve(among, low + room).error == pytest.approx(5.10)
        short = solve(among, low + room - 1)
        assert short.bytes <= low + room - 1
        assert short.error == pytest.approx(5.11)

    @settings(max_examples=20)
    @given(st.randoms(use_true_random=False), st.floats(4.2, 15.9))
    def test_the_order_in_the_file_changes_nothing(self, mix: random.Random, bits: float) -> None:
        value = record()
        expected = problem()
        budget = int(bits * expected[0].parameters * 4)  # some share of the whole
        budget = max(budget, smallest(expected).bytes)
        mix.shuffle(value["linears"])
        among = units(read(value), ("W4A16_ASYM", "W8A16", "BF16"), lambda name: False)
        assert among == expected
        assert solve(among, budget) == solve(expected, budget)

    def test_equal_units_are_served_in_their_order(self) -> None:
        options = (Option(Choice("W4A16", 128), 10, 1.0), Option(BF16, 40, 0.0))
        among = tuple(Unit(f"u{i}", (f"m.{i}.x",), 20, options) for i in range(6))
        taken = solve(among, 6 * 10 + 2 * 30 + 5)
        assert [taken.options[unit.name].choice for unit in among] == [BF16] * 2 + [
            Choice("W4A16", 128)
        ] * 4

    def test_nothing_is_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        # For some problems, of which these are two, HiGHS writes a debug line past Python's stdout.
        for layers, seed in ((24, 1), (64, 2)):
            among = problem(layers=layers, seed=seed)
            for bits in (4.5, 5, 6, 7):
                solve(among, int(bits * best(among).bytes / 16))
        assert capfd.readouterr() == ("", "")

    def test_shares_are_of_parameters(self) -> None:
        found = solve(problem(), int(smallest(problem()).bytes * 1.3))
        assert sum(found.shares.values()) == pytest.approx(1)
        wide = [u for u in problem() if found.options[u.name].choice == Choice("W8A16", 128)]
        share = sum(unit.parameters for unit in wide) / found.parameters
        assert found.shares[Choice("W8A16", 128)] == pytest.approx(share)


class TestFrontier:
    def test_it_goes_from_the_smallest_to_bf16_and_falls(self) -> None:
        among = problem()
        points = frontier(among)
        assert len(points) == 15
        assert points[0].options == smallest(among).options
        assert points[-1].options == best(among).options
        assert set(points[-1].shares) == {BF16}
        for less, more in itertools.pairwise(points):
            assert less.bytes < more.bytes
            assert less.error > more.error
            assert solve(among, more.bytes).error == pytest.approx(more.error, rel=1e-8)

    def test_no_uniform_scheme_beats_it(self) -> None:
        among = problem()
        for choice, point in uniform(among).items():
            assert set(point.shares) == {choice}
            assert solve(among, point.bytes).error <= point.error * (1 + 1e-8)

    def test_one_option_each_is_one_point(self) -> None:
        assert len(frontier(problem(("W8A16",)))) == 1


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "budget"),
        [
            ("4.5bits", Budget("4.5bits", bits=4.5)),
            (" 5 bits ", Budget("5bits", bits=5.0)),
            ("1bit", Budget("1bits", bits=1.0)),
            ("3.2GB", Budget("3.2GB", total_bytes=3_200_000_000)),
            ("350MiB", Budget("350MiB", total_bytes=350 << 20)),
            ("12kB", Budget("12kB", total_bytes=12_000)),
            ("1TiB", Budget("1TiB", total_bytes=1 << 40)),
            ("77B", Budget("77B", total_bytes=77)),
        ],
    )
    def test_spellings(self, text: str, budget: Budget) -> None:
        assert parse_budget(text) == budget

    @pytest.mark.parametrize("text", ["", "4.5", "bits", "-4bits", "0bits", "4,5bits", "3GiBs"])
    def test_mistakes(self, text: str) -> None:
        with pytest.raises(UsageError, match="--budget"):
            parse_budget(text)

    def test_bits_are_of_the_linears_and_sizes_of_everything(self) -> None:
        among = problem()
        found = choose(among, parse_budget("6bits"), 10**9)
        assert found.bits <= 6
        assert found.bits == found.bytes * 8 / sum(unit.parameters for unit in among)
        rest = 1_000_000
        total = parse_budget(f"{found.bytes + rest}B")
        assert choose(among, total, rest).options == found.options

    @pytest.mark.parametrize("text", ["4bits", "1.3MB"])
    def test_the_smallest_budget_is_named_and_enough(self, text: str) -> None:
        among = problem()
        with pytest.raises(UsageError, match="too small") as raised:
            choose(among, parse_budget(text), 500_000)
        named = raised.value.message.rpartition(" ")[2]
        assert choose(among, parse_budget(named), 500_000).options == smallest(among).options

    def test_a_budget_for_everything_is_no_search(self) -> None:
        with pytest.raises(UsageError, match="leaves everything in BF16"):
            choose(problem(), parse_budget("16bits"), 0)


MODULES = [f"model.layers.{i}.{name}" for i in range(12) for name in SHAPES]
EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{name}"
    for i in range(3, 6)
    for e in range(11)
    for name in ("gate_proj", "up_proj", "down_proj")
]
OTHERS = ["lm_head", "visual.blocks.1.mlp.fc1", "modelXlayers.1.mlp.up_proj", "model-a.0.b_c"]


class TestPatterns:
    @given(st.sets(st.sampled_from([*MODULES, *EXPERTS, *OTHERS]), min_size=1))
    def test_they_select_what_was_chosen_and_nothing_else(self, chosen: set[str]) -> None:
        everything = [*MODULES, *EXPERTS, *OTHERS]
        entries = patterns(chosen, everything)
        assert {name for name in everything if matches(name, entries)} == chosen

    @given(st.sets(st.sampled_from(sorted({served_unit(name) for name in MODULES + EXPERTS}))))
    def test_units_of_experts_stay_short(self, chosen: set[str]) -> None:
        names = {name for name in MODULES + EXPERTS if served_unit(name) in chosen}
        entries = patterns(names, MODULES + EXPERTS)
        assert {name for name in MODULES + EXPERTS if matches(name, entries)} == names
        assert not any(entry.count("experts") and r"experts\.\d+" not in entry for entry in entries)

    def test_they_are_compact(self) -> None:
        down = [name for name in MODULES if name.endswith("down_proj")]
        assert patterns(down, MODULES) == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
        some = [name for name in down if ".1" in name]
        assert patterns(some, MODULES) == [r"re:model\.layers\.(1|10|11)\.mlp\.down_proj$"]
        qkv = [f"model.layers.7.self_attn.{x}_proj" for x in "qkv"]
        assert patterns(qkv, MODULES) == [
            r"re:model\.layers\.7\.self_attn\.(k_proj|q_proj|v_proj)$"
        ]
        assert patterns([*EXPERTS[:33], "lm_head"], [*EXPERTS, "lm_head"]) == [
            r"re:model\.layers\.3\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$",
            "lm_head",
        ]


class TestRecipe:
    @settings(max_examples=25)
    @given(
        st.sampled_from(
            ["tiny-llama-awq-gptq", "tiny-llama-gptq", "tiny-llama-int8", "llama3-70b-awq"]
        ),
        st.floats(4.2, 15),
        st.integers(0, 1000),
    )
    def test_every_linear_gets_what_was_chosen(self, name: str, bits: float, seed: int) -> None:
        path = ROOT / "recipes" / f"{name}.yaml"
        recipe = load_recipe(path)
        among = problem(("W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "BF16"), seed=seed)
        budget = Budget(f"{bits:.2f}bits", bits=bits)
        found = Found(among, budget, choose(among, budget, 0), (), {}, 10**6, 4096)
        text = mixed_recipe(path.read_text(), path.name, recipe, found, {})
        written = self.load(text)
        for unit in among:
            for module in unit.linears:
                assert choice_of(written.quantize, module) == found.chosen.options[unit.name].choice
        assert written.quantize.ignore[: len(recipe.quantize.ignore)] == recipe.quantize.ignore
        kept = {"model", "calibration", "evaluate", "serve", "environments"}
        assert written.model_dump(include=kept) == recipe.model_dump(include=kept)
        for line in path.read_text().splitlines():
            comment = line.partition(" #")[2]
            assert comment in text

    @staticmethod
    def load(text: str) -> Any:
        from quantize.recipe import Recipe
        from quantize.yaml_values import parse

        document = parse(text)
        assert not document.problems
        return Recipe.model_validate(document.value)

    def found(self, budget: str = "5.5bits") -> Found:
        chosen = choose(problem(), parse_budget(budget), 0)
        return Found(problem(), parse_budget(budget), chosen, (), {}, 4_000_000, 4096)

    def test_it_says_how_it_was_made_and_publishes_elsewhere(self) -> None:
        path = ROOT / "recipes" / "tiny-llama-awq-gptq.yaml"
        text = mixed_recipe(path.read_text(), path.name, load_recipe(path), self.found(), {})
        lines = text.splitlines()
        assert lines[0].startswith("# yaml-language-server:")
        assert (
            lines[1] == "# Made by quantize search --budget 5.5bits, from tiny-llama-awq-gptq.yaml:"
        )
        recipe = self.load(text)
        assert recipe.name == "tiny-llama-awq-gptq-5.5bits"
        assert recipe.publish.folder == "out/tiny-llama-awq-gptq-5.5bits"
        to_a_bucket = load_recipe(path, ["publish.url=s3://models/tiny"])
        text = mixed_recipe(path.read_text(), path.name, to_a_bucket, self.found(), {})
        assert self.load(text).publish.url == "s3://models/tiny-5.5bits"
        assert "ignore: [lm_head] # 4-bit logits cost more quality than they save bytes" in text

    def test_the_most_common_choice_is_the_blocks_own(self) -> None:
        path = ROOT / "recipes" / "tiny-llama-awq-gptq.yaml"
        found = self.found("4.2bits")
        text = mixed_recipe(path.read_text(), path.name, load_recipe(path), found, {})
        own = self.load(text).quantize
        most = max(found.chosen.shares, key=lambda choice: found.chosen.shares[choice])
        assert (own.scheme, own.group_size) == (most.scheme, most.group_size)
        assert most not in [Choice(o["scheme"], o["group_size"]) for o in own.effective_overrides]

    def test_searched_again_it_is_headed_once(self) -> None:
        path = ROOT / "recipes" / "tiny-llama-awq-gptq.yaml"
        text = mixed_recipe(path.read_text(), path.name, load_recipe(path), self.found(), {})
        again = mixed_recipe(text, "a.yaml", self.load(text), self.found("9bits"), {})
        assert again.count("Made by") == 1
        assert "--budget 9bits, from a.yaml" in again
        assert again.count("overrides:") <= 1
        for unit in problem():
            chosen = self.found("9bits").chosen.options[unit.name].choice
            assert {choice_of(self.load(again).quantize, m) for m in unit.linears} == {chosen}


class TestReport:
    def test_table_and_json_say_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        among = problem(("W4A16_ASYM", "FP8_DYNAMIC", "BF16"))
        found = search(among, parse_budget("5bits"), 4_000_000, 4096)
        value = frontier_json(found)
        assert json.loads(json.dumps(value)) == value
        assert value["chosen"]["bits"] <= 5
        assert len(value["chosen"]["units"]) == len(found.among)
        assert [point["error"] for point in value["frontier"]][-1] == 0
        text = render(frontier_table(found))
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert text.count("5bits") == 1
        assert f"{value['chosen']['bits']:.3f}" in text
        for uniform_point in value["uniform"]:
            assert f"{uniform_point['bits']:.3f}" in text

    def test_the_plot_is_the_same_twice(self, tmp_path: Path) -> None:
        from quantize.report.frontier_plot import draw

        found = search(problem(), parse_budget("5bits"), 4_000_000, 4096)
        for name in ("a", "b"):
            draw(found, "demo", tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
        for kind in ("png", "svg"):
            first = (tmp_path / f"a.{kind}").read_bytes()
            assert first == (tmp_path / f"b.{kind}").read_bytes()
        svg = (tmp_path / "a.svg").read_text()
        for words in ("all W8A16 g128", "chosen for 5bits", "bits a quantizable parameter"):
            assert words in svg
