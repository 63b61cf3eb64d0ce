"""
Every Python snippet of the README and the pages, every example and every notebook runs as it stands, each in a process of
its own and a folder of its own. The process is forked from one that has imported torch and the package, and ``learn()``
stops after a few steps.
"""

import functools
import multiprocessing
import os
import re
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]*)(#[^)]*)?\)")
MAX_STEPS = 130  # learning starts after 100
TIMEOUT = 300  # seconds, against a snippet that hangs


def snippets() -> dict[str, str]:
    found = {}
    for page in PAGES:
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                number = 1 + sum(name.startswith(f"{page.name} ") for name in found)
                found[f"{page.name} {number}"] = code
    return found


def run_in_child(path: str, folder: str) -> None:
    """In the forked process: few steps, output into a file, failure as exit status."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"STEPS": "220", "OUT": folder, "MPLBACKEND": "Agg"}

    import torch as th
    from stable_baselines3.common import evaluation
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    th.set_num_threads(1)
    setup_learn = OffPolicyAlgorithm._setup_learn

    @functools.wraps(setup_learn)
    def setup_short_learn(self: BaseAlgorithm, total_timesteps: int, *args: object, **kwargs: object) -> object:
        return setup_learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)

    def evaluate_one_episode(*args: object, **kwargs: object) -> object:
        return evaluate(*args, **kwargs | {"n_eval_episodes": 1})

    if "notebooks" not in path:  # these have a number of steps themselves
        OffPolicyAlgorithm._setup_learn = setup_short_learn
    evaluate, evaluation.evaluate_policy = evaluation.evaluate_policy, evaluate_one_episode
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(path).parent))
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo: the first optimizer imports it
    context.set_forkserver_preload(["torch._dynamo", "stable_baselines3.sac", "matplotlib.figure", "sb3_dqs"])

    def run_script(path: Path) -> str:
        folder = tmp_path_factory.mktemp("snippet")
        process = context.Process(target=run_in_child, args=(str(path), str(folder)))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        output = (folder / "output.txt").read_text(errors="replace")
        assert process.exitcode == 0, output
        return output

    return run_script


@pytest.mark.xdist_group("snippets")
@pytest.mark.parametrize("name", snippets())
def test_snippet(run, tmp_path, name):
    path = tmp_path / "snippet.py"
    path.write_text(snippets()[name], encoding="utf-8")
    run(path)


@pytest.mark.xdist_group("snippets")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example(run, path):
    assert run(path)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_fences(page):
    """Files that are linked to exist, and every block of code has a language."""
    text = page.read_text(encoding="utf-8")
    blocks = FENCE.findall(text)
    assert all(language for language, _ in blocks)
    for target, _ in LINK.findall(FENCE.sub("", text)):
        assert not target or target.startswith("http") or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {page.name for page in PAGES[1:]} == set(re.findall(r"[\w-]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))


def test_every_metric_is_documented(make_model, tmp_path):
    from stable_baselines3.common.logger import configure

    from sb3_dqs import DiagnosticCallback

    names: set[str] = set()
    for kwargs in ({}, {"use_sde": True}):
        model = make_model(**kwargs)
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn(210, callback=DiagnosticCallback(100, n_states=1, n_actions=8, n_candidates=8), log_interval=1)
        names |= set((tmp_path / "progress.csv").read_text().splitlines()[0].split(","))
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    documented = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]*)`", row.split("|")[1])
        prefix = first.split("/")[0]
        documented |= {first, *(name if "/" in name else f"{prefix}/{name}" for name in others)}
    assert names and names <= documented, sorted(names - documented)
