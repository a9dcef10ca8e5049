"""bench/scaling_model.py by hand, and its check on measurements made up."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import scaling_check, scaling_model
from lsep.config import Config, override
from lsep.cost.cluster import MODES, Cluster, Step, Work, collective, ddp, exposed, fsdp, ring, step
from lsep.errors import UserError
from lsep.presets import PRESETS

XL = override(PRESETS["sit-xl-2-256"], {"model.in_channels": 4, "model.num_classes": 1000, "model.input_size": 32})
PARAMETERS = 674_816_272
FREE = replace(Cluster(), nvlink_latency=0.0, network_latency=0.0)
"""A cluster whose links have no latency."""


def seconds(mode: str, images: int, gpus: int, cluster: Cluster = Cluster(), config: Config = XL) -> Step:  # noqa: B008
    return step(cluster, config, mode, images, gpus, PARAMETERS)


def test_parameters_are_those_of_the_paper() -> None:
    assert scaling_model.count(XL) == PARAMETERS


def test_rings() -> None:
    assert ring(8e9, 4, 2e9, 0.0) == pytest.approx(6.0)  # 2 x 3/4 x 8 / 2
    assert ring(8e9, 4, 2e9, 0.1) == pytest.approx(6.6)  # and six hops
    assert ring(8e9, 4, 2e9, 0.0, rounds=1) == pytest.approx(3.0)
    assert ring(8e9, 1, 2e9, 0.1) == 0


def test_collectives_over_nodes() -> None:
    cluster = replace(Cluster(), nvlink=100.0, network=10.0, nvlink_latency=0.0, network_latency=1.0)
    # In the node 2 x 7/8 x 800 / 100; an eighth between 4 nodes, 2 x 3/4 x 100 / 10; a tree of depth 2, twice.
    assert collective(cluster, 800.0, 32) == pytest.approx(14 + 15 + 4)
    assert collective(cluster, 800.0, 8) == pytest.approx(14)
    assert collective(cluster, 800.0, 32, rounds=1) == pytest.approx(7 + 7.5 + 3)
    with pytest.raises(UserError, match="multiple"):
        collective(cluster, 800.0, 12)


def test_what_does_not_fit_under_the_backward() -> None:
    assert exposed(10.0, 5, 1.0) == 1.0  # all but the last
    assert exposed(10.0, 5, 3.0) == pytest.approx(7.0)  # the first is ready at 2, the fifth done at 17
    assert exposed(0.0, 5, 3.0) == 15.0


def test_ddp_by_hand() -> None:
    cluster = replace(FREE, nvlink=1e9, bucket=100.0, reduce=2)
    work = Work(forward=1.0, backward=10.0, parameters=600, late=100, units=3)
    # 10 buckets of 100 bytes and two of 100 at the end, 2 x 7/8 x 100 / 1e9 seconds each.
    bucket = 175e-9
    assert ddp(cluster, work, 8) == pytest.approx((3 * bucket, 12 * bucket))
    slow = replace(cluster, nvlink=50.0)
    assert ddp(slow, work, 8)[0] == pytest.approx(1 + 10 * 3.5 - 10 + 2 * 3.5)


def test_fsdp_by_hand() -> None:
    cluster = replace(FREE, nvlink=1e9, reduce=4)
    work = Work(forward=1.0, backward=10.0, parameters=600, late=0, units=3)
    gather, scatter = 7 / 8 * 200 * 2 / 1e9, 7 / 8 * 200 * 4 / 1e9
    assert fsdp(cluster, work, 8) == pytest.approx((2 * gather + scatter, 6 * gather + 3 * scatter))
    # hsdp on one node is fsdp; on more its gathers stay inside and its shards are averaged over the nodes.
    assert fsdp(cluster, work, 8, nodes_apart=True) == fsdp(cluster, work, 8)
    average = 2 * 3 / 4 * 100 / cluster.network
    assert fsdp(cluster, work, 32, nodes_apart=True)[1] == pytest.approx(fsdp(cluster, work, 8)[1] + 3 * average)


@pytest.mark.parametrize("mode", MODES)
def test_one_gpu_has_no_communication_and_efficiency_1(mode: str) -> None:
    found = seconds(mode, 256, 1)
    assert found.communication == found.exchange == 0
    # 868 GFLOP an image, 395 TFLOP/s; 40 bytes a parameter.
    assert found.compute == pytest.approx(256 * 868e9 / 395e12, rel=1e-2)
    assert found.optimizer == pytest.approx(40 * PARAMETERS / 4.3e12)
    for weak in (True, False):
        (row,) = scaling_model.rows(Cluster(), XL, PARAMETERS, [1], [256], weak)
        assert row["efficiency"] == pytest.approx(1) and row["communication ms"] == 0 and row["binds"] == "compute"


@pytest.mark.parametrize("mode", MODES)
def test_monotonicity(mode: str) -> None:
    gpus = scaling_model.GPUS[1:]
    exchanges = [seconds(mode, 32 * n, n).exchange for n in gpus]
    assert exchanges == sorted(exchanges) and exchanges[0] > 0
    hidden = [seconds(mode, 4096, n).communication for n in gpus]  # less backward to hide under
    assert hidden == sorted(hidden)
    rates = [n / seconds(mode, 32 * n, n).seconds for n in gpus]
    assert rates == sorted(rates)
    for name in ("matrix_rate", "copy_rate", "nvlink", "network", "host_copy"):
        faster = replace(Cluster(), **{name: 2 * getattr(Cluster(), name)})
        assert seconds(mode, 256, 64, faster).seconds < seconds(mode, 256, 64).seconds, name


def test_efficiency_falls_with_gpus() -> None:
    for weak, batches in ((True, [32, 256]), (False, [4096])):
        for batch in batches:
            rows = scaling_model.rows(Cluster(), XL, PARAMETERS, [1, 8, 64, 512], [batch], weak)
            found = [row["efficiency"] for row in rows]
            assert found == sorted(found, reverse=True) and 0 < found[-1] < found[0] == pytest.approx(1)
    assert scaling_model.rows(Cluster(), XL, PARAMETERS, [512], [256], weak=False) == []  # less than an image a GPU


def test_loader_and_checkpoint_bind_when_they_are_slow() -> None:
    slow = seconds("ddp", 256, 8, replace(Cluster(), loader=100.0))
    assert slow.largest[0] == "loader" and slow.seconds - slow.checkpoint == pytest.approx(2.56)
    size, every = 16 * PARAMETERS, XL.train.checkpoint_every
    found = seconds("ddp", 256, 8)
    assert found.checkpoint == pytest.approx(size / 25e9 / every)
    disk = seconds("ddp", 256, 8, replace(Cluster(), storage=1e6))  # three hours a checkpoint
    assert disk.seconds == pytest.approx(size / 1e6 / every + found.checkpoint)


def test_gradients_of_a_joint_modulation_come_late() -> None:
    early = override(XL, {"backend.modulation": "block"})
    apart = seconds("ddp", 2048, 8, FREE, early).communication
    late = (6 * 28 + 2) * 1152 * 1153
    more = seconds("ddp", 2048, 8, FREE).communication - apart
    assert more == pytest.approx(2 * 7 / 8 * 2 * late / 360e9, rel=0.1)


def fake(slower: float = 1.0) -> dict[int, scaling_check.Found]:
    """Measurements on 2 cores: 0.1 s and 10 ms an image, 1 GB/s, 1 ms a hop, 25 MiB of gradients; 8 images."""
    found: dict[int, scaling_check.Found] = {}
    size = 25 * 2**20
    for n in (1, 2, 4):
        shared = max(1.0, n / 2)
        sums = {s: shared * ring(s, n, 1e9, 1e-3) for s in scaling_check.SIZES}
        exchange = ring(size, n, 1e9, 3e-3) if n > 1 else 0.0
        found[n] = {str(s): [value] for s, value in sums.items() if n > 1} | {"parameters": [size / 4]}
        for kind, images in (("weak", 8), ("strong", 32 / n), ("apart", 8)):
            took = shared * (0.1 + 0.01 * images + (exchange if kind != "apart" else 0.0))
            took *= slower if n > 1 else 1.0
            found[n][kind] = [took * f for f in (0.9, 1.0, 1.3)]
    return found


def test_check_predicts_what_follows_the_model() -> None:
    section = scaling_check.compare(fake(), share=8, cores=2)
    assert [row["predicted / measured"] for row in section.rows] == pytest.approx([1.0] * len(section.rows))
    assert section.details == pytest.approx({"overhead": 0.1, "image": 0.01, "latency": 1e-3, "bandwidth": 1e9})


def test_check_says_by_how_much_it_is_off() -> None:
    rows = scaling_check.compare(fake(slower=2.0), share=8, cores=2).rows
    steps = {row["processes"]: row["predicted / measured"] for row in rows if "images" in row["what"]}
    assert steps == pytest.approx({1: 1.0, 2: 0.5, 4: 0.5})


def test_check_counts_the_quietest_half() -> None:
    launches = [(0.5, {"weak": [9.0]}), (0.1, {"weak": [2.0, 3.0]}), (0.2, {"weak": [1.0]})]
    assert scaling_check.quietest({4: launches}) == {4: {"weak": [2.0, 3.0, 1.0]}}


def test_command(tmp_path: Path) -> None:
    files = tmp_path / "model.json", tmp_path / "model.md"
    command = ["--gpus", "1", "64", "--batch-size", "32", "--global-batch", "256", "--images-per-second", "600"]
    assert scaling_model.main([*command, "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    found = json.loads(files[0].read_text())
    one, many = found["strong"]
    assert one["terms"]["compute"] == pytest.approx(256 / 600) and many["images a GPU"] == 4
    assert many["ms"] == pytest.approx(1e3 * math.fsum(many["terms"].values()))
    text = files[1].read_text()
    assert all(f"* {note}\n" in text for note in found["assumptions"])
    assert scaling_model.main(["--nvlink", "0"]) == scaling_model.main(["--gpus", "12"]) == 2
    args = scaling_model.parse(["--network-gbit-per-node", "3200"])
    assert scaling_model.cluster_of(args, XL).network == 50e9
