"""Workers on cores: groups of the tree stay together on made-up machines, and runs keep out of each other's way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.spheres.placement import Claims, Core, claim, place, read_cores
from cllm_spheres.spheres.topology import group


def machine(sockets, caches, cores, first_cpu=0):
    """`caches` third-level caches in each socket, `cores` cores in each of them."""
    return [
        Core(first_cpu + (s * caches + c) * cores + i, s, first_cpu + (s * caches + c) * cores)
        for s in range(sockets) for c in range(caches) for i in range(cores)
    ]  # fmt: skip


TWO_SOCKETS = machine(2, 1, 32)
EIGHT_CACHES = machine(1, 8, 8)


def spots(num_workers, cores, of):
    """Group -> the sockets or caches in which its workers are."""
    by_cpu = {core.cpu: getattr(core, of) for core in cores}
    found = defaultdict(set)
    for worker, cpu in enumerate(place(num_workers, cores)):
        found[group(worker, num_workers)].add(by_cpu[cpu])
    return found


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 16), st.data())
def test_every_worker_has_a_core_of_its_own_or_none_has_one(sockets, caches, cores, data):
    whole = machine(sockets, caches, cores)
    some = data.draw(st.lists(st.sampled_from(whole), unique=True))
    workers = data.draw(st.integers(1, 156))
    cpus = place(workers, some)
    assert len(set(cpus)) == len(cpus) == (workers if workers <= len(some) else 0)
    assert set(cpus) <= {core.cpu for core in some}


@pytest.mark.parametrize("workers", [12, 24, 48, 60, 63, 64])
def test_no_group_lies_in_two_sockets(workers):
    assert all(len(sockets) == 1 for sockets in spots(workers, TWO_SOCKETS, "socket").values())


@pytest.mark.parametrize("workers", [12, 24, 36])
def test_a_group_lies_in_one_cache_where_it_fits(workers):
    assert all(len(caches) == 1 for caches in spots(workers, EIGHT_CACHES, "cache").values())


def test_groups_that_do_not_fit_are_few_and_stay_in_few_caches():
    # 12 groups of 5 and 6 in 8 caches of 8: one for each cache, the other 4 take what they leave, 2 or 3 of each
    counts = sorted(len(caches) for caches in spots(63, EIGHT_CACHES, "cache").values())
    assert counts[:8] == [1] * 8 and counts[-1] <= 3


@pytest.mark.parametrize(("cores", "of"), [(TWO_SOCKETS, "socket"), (EIGHT_CACHES, "cache")])
def test_few_workers_spread_over_sockets_and_caches(cores, of):
    by_cpu = {core.cpu: getattr(core, of) for core in cores}
    places = set(by_cpu.values())
    assert {by_cpu[cpu] for cpu in place(len(places), cores)} == places


def test_a_limited_set_of_cores_is_all_that_is_used():
    some = TWO_SOCKETS[30:34]  # two of each socket
    assert sorted(place(4, some)) == [30, 31, 32, 33]
    assert place(5, some) == []


def test_cores_are_read_as_the_kernel_lists_them(tmp_path):
    for cpu in range(64):
        for name, text in (
            ("topology/physical_package_id", f"{cpu // 32}\n"),
            ("cache/index3/shared_cpu_list", f"{cpu // 8 * 8}-{cpu // 8 * 8 + 7},{64 + cpu // 8 * 8}-99\n"),
        ):
            path = tmp_path / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert read_cores([0, 9, 63], tmp_path) == [Core(0, 0, 0), Core(9, 0, 8), Core(63, 1, 56)]
    assert len({(core.socket, core.cache) for core in read_cores([500, 501], tmp_path)}) == 1  # nothing is said


# CPUs that no machine of the tests has, others in each process that runs tests: no run under way is in the way
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
FAR = machine(1, 1, 4, first_cpu=1_000_000 + 4 * PROCESS)


def test_two_runs_take_different_cores_and_a_third_is_not_pinned():
    one, first = claim(2, FAR)
    other, second = claim(2, FAR)
    assert len({*first, *second}) == 4
    assert claim(1, FAR)[1] == []
    one.keep([])
    assert claim(2, FAR)[1] == first
    other.keep([])


def test_cores_that_were_not_needed_are_given_back():
    claims, cpus = claim(1, FAR)
    assert len(Claims().take(FAR)) == 3 and cpus[0] not in [core.cpu for core in Claims().take(FAR)]
    claims.keep([])


def test_a_claim_ends_with_its_process():
    code = (
        "from tests.spheres.test_placement import FAR, claim\n"
        "held, cpus = claim(4, FAR); print(cpus, flush=True); import time; time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == f"{[core.cpu for core in FAR]}\n"
        assert claim(1, FAR)[1] == []
    finally:
        child.kill()
        child.communicate()
    claims, cpus = claim(4, FAR)
    assert len(cpus) == 4
    claims.keep([])
