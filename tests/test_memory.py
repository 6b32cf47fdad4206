"""Memory that is free is what this process may use: limits of cgroups, of any nesting, from made-up trees of files."""

from pathlib import Path

import psutil
import pytest

from gptoss_jax.run import memory

GIB = 1 << 30
Tree = dict[str, str]


def group(where: str, limit: object, used: object, **more: object) -> Tree:
    """A cgroup of version 2."""
    files = {"memory.max": limit, "memory.current": used} | {k.replace("_", "."): v for k, v in more.items()}
    return {f"{where}/{name}": f"{value}\n" for name, value in files.items()}


def old_group(where: str, limit: object, used: object, stat: str = "") -> Tree:
    """One of version 1."""
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"memory/{where}/{name}": f"{value}\n" for name, value in files.items()}


OPEN = group(".", "max", 9 * GIB)
CASES: dict[str, tuple[str, Tree, list[int]]] = {
    "no cgroups": ("", {}, []),
    "no limit": ("0::/a", OPEN | group("a", "max", GIB), []),
    "a container sees itself as the root": ("0::/", group(".", 8 * GIB, 3 * GIB), [5 * GIB]),
    "the process' own": ("0::/a/b", OPEN | group("a/b", 4 * GIB, GIB), [3 * GIB]),
    "one above it": ("0::/a/b/c", OPEN | group("a", 4 * GIB, GIB) | group("a/b/c", "max", 5), [3 * GIB]),
    "several, the tightest above": (
        "0::/a/b",
        group("a", 4 * GIB, 4 * GIB - 7) | group("a/b", 2 * GIB, GIB),
        [GIB, 7],
    ),
    "one beside it": ("0::/a/b", group("a/b", 4 * GIB, GIB) | group("a/other", 9, 8), [3 * GIB]),
    "what is used up": ("0::/a", group("a", GIB, GIB + 4096), [0]),
    "memory.high slows down before memory.max stops": ("0::/a", group("a", 4 * GIB, GIB, memory_high=2 * GIB), [GIB]),
    "memory.high alone": ("0::/a", group("a", "max", GIB, memory_high=2 * GIB), [GIB]),
    "files that were read are free": (
        "0::/a",
        group("a", 4 * GIB, 3 * GIB, memory_stat=f"anon 5\ninactive_file {2 * GIB}\nactive_file 9"),
        [3 * GIB],
    ),
    "a path of the host, of which a container sees its own": ("0::/docker/abc", group(".", 2 * GIB, GIB), [GIB]),
    "a path outside of the namespace": ("0::/../other", group(".", 2 * GIB, GIB) | group("..", 9, 8), [GIB]),
    "files above the mount are none of a cgroup": ("0::/a", group(".", 2 * GIB, GIB) | group("..", 9, 8), [GIB]),
    "version 1": ("4:memory:/a/b", old_group("a/b", 4 * GIB, GIB), [3 * GIB]),
    "version 1, above": (
        "9:name=systemd:/x\n4:cpu,memory:/a/b\n3:cpu:/c",
        old_group("a", 4 * GIB, GIB) | old_group("a/b", 9223372036854771712, 5),
        [9223372036854771712 - 5, 3 * GIB],
    ),
    "version 1, files that were read": (
        "4:memory:/",
        old_group(".", 4 * GIB, 3 * GIB, f"inactive_file 1\ntotal_inactive_file {GIB}"),
        [2 * GIB],
    ),
    "both versions": ("4:memory:/a\n0::/b", old_group("a", 2 * GIB, GIB) | group("b", 8 * GIB, 5), [GIB, 8 * GIB - 5]),
    "another controller": ("4:cpu:/a", old_group("a", 2 * GIB, GIB), []),
    "no use": ("0::/a", {"a/memory.max": "5\n"}, []),
    "garbage": (
        "no line\n0::\n::\n0::/a\n\n7:memory",
        group("a", "lots", "-5", memory_stat="inactive_file\nx") | group(".", "½", ""),
        [],
    ),
    "garbage in memory.stat": ("0::/a", group("a", 9, 4, memory_stat="inactive_file many\n\n "), [5]),
    "a limit of countless digits": ("0::/a", group("a", "9" * 5000, 4), []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cgroups_leave(name: str, tmp_path: Path) -> None:
    of_process, tree, rooms = CASES[name]
    for file, content in tree.items():
        (tmp_path / "cgroup" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / file).write_text(content, encoding="utf-8")
    (tmp_path / "of-process").write_text(of_process + "\n")
    assert memory.cgroup_rooms(tmp_path / "cgroup", tmp_path / "of-process") == rooms


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    assert memory.cgroup_rooms(tmp_path, tmp_path / "gone") == []
    (tmp_path / "of-process").write_bytes(b"0::/\xff\n")
    assert memory.cgroup_rooms(tmp_path, tmp_path / "of-process") == []
    (tmp_path / "memory.max").mkdir()
    assert memory.cgroup_rooms(tmp_path, tmp_path / "of-process") == []


def test_the_least_of_all_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cgroup_rooms", lambda: [5 << 20, 3 << 20])
    assert memory.available() == 3 << 20
    monkeypatch.setattr(memory, "cgroup_rooms", list)
    assert abs(memory.available() - psutil.virtual_memory().available) < GIB
