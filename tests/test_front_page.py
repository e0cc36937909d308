"""README.md and docs/index.md: short, their links lead somewhere, their commands are read as they stand, and the picture is what a report shows."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from test_page_one import fronted
from worlds import toy

import expunge
from expunge.core.modality import meant

ROOT = Path(__file__).parent.parent
README, INDEX = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
_spec = importlib.util.spec_from_file_location("docs_page_one", ROOT / "docs" / "page_one.py")
page_one = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_one)

OWN = set(re.findall(r"^  --([\w-]+)", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE))
COMMANDS = sorted(
    {*re.findall(r"^    (expunge forget .*)", README, re.MULTILINE), *re.findall(r"`(expunge forget .*?)`", INDEX)} - {"expunge forget MODEL --help"}
)


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, part = link.partition("#")
        found = (ROOT / page).parent / name if name else ROOT / page
        assert found.is_file(), link
        heads = (
            {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE)} if part else {part}
        )
        assert part in heads, link


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folders and files that the commands name, small."""
    pytest.importorskip("transformers")
    from test_doors_models import CONFIG, folder_of, vit

    from expunge.modalities.text_classification import checkpoints
    from expunge.modalities.text_classification import worlds as topics

    place = tmp_path_factory.mktemp("front")
    folder_of(place / "train", n=6)
    folder_of(place / "test", n=6, start=500)
    vit().save_pretrained(place / "vit")
    (place / "vit" / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    checkpoints.save(toy("text_classification")[0], topics.tokenizer(), place / "bert")
    rows = topics.sentences(60)
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        told = [f'{i},"{r["text"]}",{r["label"]}\n' for i, r in enumerate(part)]
        (place / f"{name}.csv").write_text(
            "id,text,label\n" + "".join(told) + ("".join(f'42,"{r["text"]} once",{r["label"]}\n' for r in part[:1]) if name == "train" else "")
        )
    return place


def of_their_own(line: str, place: Path) -> dict[str, str]:
    """Model, request and options of a line, as the command line would hand them on; its own options are checked to exist and left out."""
    words = shlex.split(line)[2:]
    model, what, rest = words[0], words[1], words[2:]
    given = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(rest[::2], rest[1::2], strict=True)}
    has = {o.name for o in meant(given.get("task", ""), model, place).options}
    for name in set(given) - has:
        assert name.replace("_", "-") in OWN, f"{name} is no option"
    return {"model": model, "what": what, **{k: v for k, v in given.items() if k in has}}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_read_as_they_stand(home, line, tmp_path):
    place = tmp_path
    for folder in ("vit", "bert", "train", "test"):
        (place / folder).symlink_to(home / folder)
    for name in ("chat", "pipeline"):
        (place / name).mkdir()
    (place / "chat" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (place / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for name in ("train", "test"):
        shutil.copy(home / f"{name}.csv", place / f"{name}.csv")
    given = of_their_own(line, place)
    kind = meant("", given["model"], place).name
    assert kind == {"vit": "classification", "bert": "text_classification", "chat": "causal_lm", "pipeline": "diffusion"}.get(given["model"], "classification")
    if given["model"] in ("vit", "bert"):
        opened = expunge.opened(given.pop("model"), given.pop("what"), folder=place, **given)
        assert len(opened.split.forget) in (2, 6) or opened.split.asked.endswith("(music)")
        assert len(opened.split.retain) and len(opened.split.test)


def test_the_short_python_of_the_front_page(home):
    """The lines between ```py and ```, with a model and data of those names; ```python is run by the door."""
    files, memory = re.findall(r"^```py\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert max(len(files.splitlines()), len(memory.splitlines())) <= 5
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    x = torch.randn(400, 4)
    parts = [torch.utils.data.TensorDataset(x[a:b], (x[a:b, 0] > 0).long()) for a, b in ((0, 200), (200, 400))]
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-9.0, 0, 0, 0], [9.0, 0, 0, 0]]))
    names = {"expunge": expunge, "model": model, "train_set": parts[0], "test_set": parts[1]}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exec(memory, names)
    assert (
        names["verdict"].reasons and names["split"].forget.ids.tolist() == [3, 14, 15] and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    )


def test_the_picture_is_page_one_of_a_report():
    made = re.sub(r"\s|&#160;", "", re.sub("<[^>]+>", "", page_one.drawn(fronted())))
    assert "SUPPORTED" in made or "VERIFIED" in made or "INCONCLUSIVE" in made or "REFUTED" in made
    kept = (ROOT / "docs" / "page-one.svg").read_text()
    told = re.sub(r"\s|&#160;", "", re.sub("<[^>]+>", "", kept))
    assert "VERIFIED" in told and "Digits:forgetclass:3" in told and "Theweakestlink" in told
    assert "@font-face" not in kept and re.findall(r"https?://[^\s\"]+", kept) == ["http://www.w3.org/2000/svg"]
