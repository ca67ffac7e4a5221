"""The package as it is installed: its names, its stubs, its kernels, and what it links."""

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ferroflash
from ferroflash import _native

FOLDER = Path(ferroflash.__file__).parent


def test_names():
    assert ferroflash.__version__ == metadata.version("ferroflash")
    for name in ferroflash.__all__:
        if name != "flag_attn":
            assert hasattr(ferroflash, name), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ferroflash.nothing  # noqa: B018


def test_kernels_are_inside():
    if _native.kernel_count() == 0:
        pytest.skip("a build without the feature cuda")
    assert _native.kernel_count() > 50


def test_what_the_native_module_links():
    (native,) = FOLDER.glob("_native*.so")
    try:
        text = subprocess.run(["ldd", native], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("ldd is not here")
    for library in ("cuda", "torch", "python", "c10"):
        assert f"lib{library}" not in text


def test_import_loads_nothing_extra():
    script = (
        "import sys, ferroflash\n"
        "assert not any(name.split('.')[0] in ('transformers', 'triton', 'flash_attn') for name in sys.modules)\n"
        "assert 'ferroflash.flag_attn' not in sys.modules and 'ferroflash.transformers' not in sys.modules\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_stubs_name_what_is_there():
    stub = (FOLDER / "_native.pyi").read_text()
    for name in dir(_native):
        if not name.startswith("_"):
            assert f"def {name}(" in stub, name
    assert (FOLDER / "py.typed").is_file()


@pytest.mark.parametrize("name", [name for name in ferroflash.__all__ if name not in ("flag_attn", "__version__")])
def test_public_functions_are_typed_and_described(name):
    function = getattr(ferroflash, name)
    assert function.__doc__
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
