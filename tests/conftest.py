"""Pico models and run folders, made on the spot. One thread: tests run side by side."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.slurm_cluster import Cluster, slurm_cluster, why_not

IN_MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > 4e9:
    os.environ["TMPDIR"] = tempfile.tempdir = str(IN_MEMORY)  # tests wait for a disk a tenth of their time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="btx-test-cache-")  # nothing of a test stays with the user

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # nohup and a shell's background; btx leaves what is ignored ignored
        signal.signal(number, handler)
# The same examples in every run: what fails on one machine fails on all. Widened by hand, with --hypothesis-seed.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")
gc.disable()  # until all test modules are imported: what they make stays


ENGINES = ("slurm", "ray", "chaos", "texts", "long", "browser")
CLUSTERS = ("slurm", "ray")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--engines: also run tests that start an engine of its own, which takes minutes."""
    parser.addoption("--engines", action="store_true", help=f"run tests marked {', '.join(ENGINES)} too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --engines their tests skip themselves; a cluster or file shares a process."""
    if not config.getoption("--engines"):
        for item in items:
            if any(item.get_closest_marker(engine) for engine in ENGINES):
                item.add_marker(pytest.mark.skip(reason="starts an engine and takes minutes: make test-engines"))
        return
    for item in items:
        group = next((cluster for cluster in CLUSTERS if item.get_closest_marker(cluster)), item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what the imports have made."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()


@pytest.fixture(scope="module")
def figures_drawn_once() -> Iterator[None]:
    """The reports of a file draw a figure of the same values once."""
    from tests.report_data import drawn_once

    with drawn_once():
        yield


def pytest_unconfigure() -> None:
    """Leave no cache behind."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A Slurm cluster with two nodes that all of Slurm's programs talk to while it is there."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="btx-slurm-") as folder,
        pytest.MonkeyPatch.context() as patch,
        slurm_cluster(Path(folder)) as cluster,
    ):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    if (chromium := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


PICO_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 320, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with jovial zebras and sing".split()


def pico_texts(count: int = 60) -> list[str]:
    """Short documents with some structure to learn."""
    return [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30)) + f" {i}." for i in range(count)]


@pytest.fixture(scope="session")
def pico_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 320 entries."""
    from btx.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(pico_texts(), 320).save_pretrained(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path, made_llama: Callable[..., Path]) -> Callable[..., Path]:
    """make_llama(name, noise_seed, **config): a pico Llama folder; other noise seeds are branches of seed 0.

    Norms are randomised too: at their default of 1 wrong mappings look right.
    """
    import torch

    def make(name: str, noise_seed: int = 0, **config: Any) -> Path:
        torch.manual_seed(noise_seed)
        made = made_llama(noise_seed, json.dumps(PICO_LLAMA | config))
        return Path(shutil.copytree(made, tmp_path / name, dirs_exist_ok=True))

    return make


@pytest.fixture(scope="session")
def made_llama(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer_folder: Path) -> Callable[..., Path]:
    """made_llama(noise_seed, config as JSON): the folder that `make_llama` copies; many tests begin with the same."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from btx.models.loading import quiet_transformers

    @cache
    def make(noise_seed: int, config: str) -> Path:
        quiet_transformers()
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**json.loads(config)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            torch.manual_seed(noise_seed)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 * bool(noise_seed))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(pico_tokenizer_folder).save_pretrained(folder)
        return folder

    return make
