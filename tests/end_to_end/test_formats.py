"""Every scheme's tensors as compressed-tensors stores them: our layouts and our values."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.engines import stream
from quantize.formats import weight_format
from quantize.schemes import GROUPED
from quantize.tensors import from_float32, load_tensor, read_header, to_float32

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def written(
    environment_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    maker = Path(__file__).with_name("make_formats.py")
    python = environment_python("llmcompressor")
    subprocess.run([str(python), str(maker), str(folder)], check=True, timeout=300)
    return folder


def cases(folder: Path) -> dict[Path, tuple[str, int | str | None]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        scheme, _, size = path.stem.partition("-")
        found[path] = (scheme, int(size) if size.isdigit() else size if size != "None" else None)
    return found


def test_every_scheme_is_among_them(written: Path) -> None:
    found = set(cases(written).values())
    schemes = {scheme for many in stream.METHODS.values() for scheme in many}
    assert {scheme for scheme, _ in found} == schemes
    assert {scheme for scheme, size in found if size == "channel"} == GROUPED


def test_layout_and_values(written: Path) -> None:
    for path, (scheme, size) in cases(written).items():
        header = read_header(path)
        theirs = header.pop("dequantized")
        form = weight_format(scheme, size)
        stored = {name: (info.dtype, info.shape) for name, info in header.items()}
        assert stored == form.layout(theirs.shape, "BF16"), path.stem
        rows, columns = theirs.shape
        ours = form.dequantized_rows(header, np.arange(rows), columns)
        # Theirs is in BF16, which ours is rounded to; ours is exact but for NVFP4's division.
        assert np.array_equal(from_float32(ours, "BF16"), load_tensor(theirs)), path.stem
        some = np.array([130, 7, 8, 64])
        assert np.array_equal(form.dequantized_rows(header, some, columns), ours[some]), path.stem
        assert np.abs(to_float32(load_tensor(theirs), "BF16")).max() > 1
