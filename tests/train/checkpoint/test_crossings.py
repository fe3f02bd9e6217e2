"""Checkpoints across plans: saved under one, loaded under another, trained on, saved there, and loaded back.

Each crossing: all weights, moments, counts, the data's cursor and the guard are those that were saved, bit for bit; a
rank reads the bytes of its boxes and no others; two more steps in float64 are those of the unbroken run.
"""

from pathlib import Path

import crossing_cases as cases
import pytest
from crossing_cases import CROSSINGS, num_ranks

from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.checkpoint.verify import verify

pytestmark = pytest.mark.slow
TEXT = "\n".join(f"{number} times {number} is {number**2}" for number in range(300))


def in_worlds(world, side, folder, plan_of):
    """Runs one side of all crossings, those of equally many ranks in one world; what each rank found, by crossing."""
    by_ranks = {}
    for number, crossing in enumerate(CROSSINGS):
        by_ranks.setdefault(num_ranks(plan_of(crossing)), []).append(number)
    found = {}
    for count, numbers in by_ranks.items():
        ranks = world(side, count, str(folder), numbers)
        found |= {number: [rank[number] for rank in ranks] for number in numbers}
    return found


@pytest.fixture(scope="module")
def crossed(world, tmp_path_factory):
    """What was found on arrival and on the way back, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("crossings")
    (folder / "text.txt").write_text(TEXT)
    (folder / "run.toml").write_text(cases.CONFIG)
    in_worlds(world, cases.leave, folder, lambda crossing: crossing.source)
    there = in_worlds(world, cases.arrive, folder, lambda crossing: crossing.target)
    back = in_worlds(world, cases.come_back, folder, lambda crossing: crossing.source)
    for number, crossing in enumerate(CROSSINGS):
        seconds, read = (max(rank[key] for rank in there[number]) for key in ("seconds", "read"))
        print(f"{crossing}: {seconds:.2f} s, at most {read} bytes read by a rank")
    return folder, there, back


@pytest.mark.parametrize("number", range(len(CROSSINGS)), ids=map(str, CROSSINGS))
def test_a_run_goes_on_under_another_plan(crossed, number):
    _, there, back = crossed
    assert [rank["wrong"] for rank in there[number]] == [[]] * num_ranks(CROSSINGS[number].target)
    assert [rank["wrong"] for rank in back[number]] == [[]] * num_ranks(CROSSINGS[number].source)


@pytest.mark.parametrize("number", range(len(CROSSINGS)), ids=map(str, CROSSINGS))
def test_a_checkpoint_holds_every_element_once_whatever_the_plan(crossed, number):
    """Files are as long as their headers and the whole tensors, of both plans; loading shares the whole out."""
    folder, there, _ = crossed
    sizes = []
    for run in (f"run{number}", f"back{number}"):
        path = complete(Path(folder, "runs", run, "checkpoints"))[0]
        assert verify(path) == []
        manifest = read_manifest(path)
        headers = sum(8 + int.from_bytes((path / name).read_bytes()[:8], "little") for name in manifest.files)
        own = [it for name, it in manifest.tensors.items() if name.startswith("rank-")]
        sizes.append(sum(file.size for file in manifest.files.values()) - headers - sum(map(bytes_of, own)))
        assert sizes[-1] == sum(map(bytes_of, manifest.tensors.values())) - sum(map(bytes_of, own))
    assert sizes[0] == sizes[1]
    assert sum(rank["read"] for rank in there[number]) >= sizes[0]


def bytes_of(stored):
    return sum(stored.bytes_of(shard) for shard in stored.shards)
