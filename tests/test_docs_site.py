"""The documentation as a site: it builds without a warning, needs no network, and shows every setting."""

from __future__ import annotations

import dataclasses
import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marval_rl.recipes.data_arguments import DataArguments
from marval_rl.recipes.evaluation_arguments import EvaluationArguments
from marval_rl.recipes.network_arguments import LoraArguments, ModelArguments, RewardArguments
from marval_rl.trainers.distill import DistillConfig
from marval_rl.trainers.grpo_config import MARGRPOConfig
from marval_rl.trainers.pretrain import PretrainConfig
from marval_rl.trainers.reward_backprop import RewardBackpropConfig

pytestmark = pytest.mark.timeout(900)  # a build takes 20 s, and minutes on a machine that is busy
ROOT = Path(__file__).parents[1]
TRAINERS = (PretrainConfig, DistillConfig, MARGRPOConfig, RewardBackpropConfig)
ROW = re.compile(r'<td><p><code[^>]*><span class="pre">(\w+)</span></code>(.*?)</tr>', re.DOTALL)
OTHERS = (DataArguments, EvaluationArguments, LoraArguments, ModelArguments, RewardArguments)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """Name -> HTML of each page, from a build in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "doctrees", ROOT / "docs"]
    done = subprocess.run([*command, folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = (folder / "html").rglob("*.html")
    return {str(page.relative_to(folder / "html").with_suffix("")): page.read_text() for page in pages}


def test_every_page_is_in_the_site(site):
    sources = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    assert sources <= set(site)


def test_every_setting_of_our_own_has_a_row_with_its_help(site):
    rows = {
        html.unescape(name): re.sub("<.*?>", "", text)
        for page, text in site.items()
        if page.startswith("trainers/")
        for name, text in ROW.findall(text)
    }
    fields = {
        field.name
        for kind in (*TRAINERS, *OTHERS)
        for base in kind.__mro__
        if base.__module__.startswith("marval_rl.")
        for field in (dataclasses.fields(base) if dataclasses.is_dataclass(base) else ())
        if field.name in vars(base).get("__annotations__", {})
    }
    assert fields - {"remove_unused_columns"} <= set(rows)
    assert "Standard deviation of the policy" in rows["policy_std"]
    assert "= 0.1" in rows["policy_std"] and "When: " in rows["policy_std"]
    assert "Only with the GSIM anchor" in rows["gsim_batch_size"]


def test_the_site_needs_no_network_and_formulas_no_script(site):
    loaded = [
        tag
        for text in site.values()
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", text)
        if re.search(r"(src|href)=\"(https?:)?//", tag) and 'rel="canonical"' not in tag
    ]
    assert loaded == []
    assert "<math" in site["concepts"] and "\\mathcal" not in site["concepts"]


def test_a_setting_that_does_not_exist_fails_the_build(tmp_path):
    (tmp_path / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    kind = "marval_rl.trainers.reward_backprop.RewardBackpropConfig"
    (tmp_path / "index.md").write_text(f"# x\n\n```{{options}} {kind}\n\nbackprop_stepz: never\n```\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", tmp_path, tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "backprop_stepz: no settings of" in done.stderr
