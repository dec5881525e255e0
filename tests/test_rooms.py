"""Who may import whom, and what each room promises to do without."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from conftest import REPOSITORY

# From the ground up. A room imports from lower floors only, and never from its own floor.
FLOORS = [
    ("runtime",),
    ("model", "muon", "corpus", "diagnosis"),
    ("formats",),
    ("fineweb", "hellaswag", "sample", "plot"),
    ("training",),
    ("train",),
    ("bench",),
]
# Methods of GPT that import what they need when they are called: from_pretrained, save_pretrained, generate.
LATE = {("model", "formats"), ("model", "sample")}


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Return the rooms that a file imports from, each with whether that is at the top of the file."""
    tree, found = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module.split(".")[0], node in tree.body))
    return found


def test_rooms_import_from_lower_floors_only():
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    files = {path: path.stem for path in REPOSITORY.glob("*.py")}
    for room in (room for room in floor_of if (REPOSITORY / room).is_dir()):
        files |= dict.fromkeys((REPOSITORY / room).glob("*.py"), room)
    assert set(files.values()) == floor_of.keys()
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {other}"
        for path, room in files.items()
        for other, at_top in imports_of(path)
        if other in floor_of and other != room and floor_of[other] >= floor_of[room]
        if at_top or (room, other) not in LATE
    ]
    assert not wrong


def test_installation_has_every_room():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["py-modules"]) == {path.stem for path in REPOSITORY.glob("*.py")}
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert set(settings["packages"]) == folders <= {room for rooms in FLOORS for room in rooms}


ALONE = """
import torch
from model import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
weights = [each for group in model.optimizer_groups(weight_decay=0.1) for each in group["params"]]
idx = torch.arange(8)[None]
losses = []
for _ in range(20):
    loss = model(idx, idx.roll(-1))[1]
    with torch.no_grad():  # an optimizer of torch would import its compiler, which takes seconds
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights)):
            weight -= 0.1 * gradient
    losses.append(loss.item())
print(losses[-1] < losses[0] and model(idx)[0].shape == (1, 8, 16))
"""


def test_model_file_alone_in_a_folder_trains(tmp_path):
    (tmp_path / "model.py").write_text((REPOSITORY / "model.py").read_text())
    (tmp_path / "alone.py").write_text(ALONE)
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
