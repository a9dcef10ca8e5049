"""Every way in against every way out: a decoder gets what its VAE encoded, however that was normalised between."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pip install diffusers")

from conftest import tiny
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from safetensors.numpy import save_file

from lsep import decode, sample
from lsep.cli import main
from lsep.data.forms import EDM2_MEAN, EDM2_STD, open_form
from lsep.data.index import index
from lsep.data.latents import Latents, as_stored, encoder_fingerprint, of_vae, raw
from lsep.data.manifest import Manifest, parse_described
from lsep.data.store import Store
from lsep.data.writer import build, write_store
from lsep.errors import UserError
from lsep.evaluate.images import of_rows
from lsep.run import Run
from lsep.train import train

ROWS, SIDE = 20, 8
LABELS = np.arange(ROWS) % 4


def raw_latents() -> np.ndarray:
    """What a VAE encodes, `(20, 4, 8, 8)`, with EDM2's statistics by channel, which are far from each other."""
    x = np.random.default_rng(0).normal(size=(ROWS, 4, SIDE, SIDE))
    return (x * EDM2_STD[:, None, None] + EDM2_MEAN[:, None, None]).astype(np.float32)


def per_file(folder: Path, rows: np.ndarray, name: str) -> None:
    labels = []
    for i, row in enumerate(rows):
        file = f"00000/{name}-{i:08d}.npy"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / file, row)
        labels.append([file, int(LABELS[i])])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def moments(folder: Path, form: str) -> Path:
    z = raw_latents()
    per_file(folder / "set", np.concatenate([z, np.full_like(z, 0.01)], 1), "img-mean-std")
    build(open_form(folder / "set", form), folder / "store", progress=False)
    return folder / "store"


def fast_dit(folder: Path, in_place: bool) -> Path:
    for i, z in enumerate(raw_latents()):
        for kind, value in (("features", z[None] * np.float32(0.18215)), ("labels", LABELS[i : i + 1])):
            (folder / f"set/x_{kind}").mkdir(parents=True, exist_ok=True)
            np.save(folder / f"set/x_{kind}/{i:02d}.npy", value)
    if in_place:
        index(folder / "set", progress=False)
        return folder / "set"
    build(open_form(folder / "set"), folder / "store", progress=False)
    return folder / "store"


def lightningdit(folder: Path, in_place: bool) -> Path:
    z = raw_latents()
    (folder / "set").mkdir()
    save_file({"latents": z, "labels": LABELS}, folder / "set/latents_rank00_shard000.safetensors")
    axes = (0, 1, 2, 3) if in_place else (0, 2, 3)  # only what all channels share can stay in place
    stats = {"mean": z.mean(axes, keepdims=True), "std": z.std(axes, keepdims=True)}
    torch.save({k: torch.tensor(v).expand(1, 4, 1, 1) for k, v in stats.items()}, folder / "set/latents_stats.pt")
    if in_place:
        index(folder / "set", scale=1.3, progress=False)
        return folder / "set"
    build(open_form(folder / "set", scale=1.3), folder / "store", progress=False)
    return folder / "store"


def written(folder: Path) -> Path:
    way = Latents((1.0, -2.0, 0.0, 0.5), (1.5, 0.5, 2.0, 3.0), 0.7, 0.18215)
    m = Manifest("", "samples", (4, SIDE, SIDE), ROWS, 4, 4, latents=way)
    x = as_stored(torch.from_numpy(raw_latents()), m).numpy()
    write_store(folder / "store", kind="samples", x=x, y=LABELS, num_classes=4, scale=2, shift=0.3, latents=way)
    return folder / "store"


WAYS_IN: dict[str, Callable[[Path], Path]] = {
    "edm2": lambda folder: moments(folder, "edm2"),
    "repa": lambda folder: moments(folder, "repa"),
    "fast-dit": lambda folder: fast_dit(folder, False),
    "fast-dit-in-place": lambda folder: fast_dit(folder, True),
    "lightningdit": lambda folder: lightningdit(folder, False),
    "lightningdit-in-place": lambda folder: lightningdit(folder, True),
    "write_store": written,
}


class Vae(torch.nn.Module):
    """Decodes a latent z to the image z[:3] / 20, so that what comes out says what went in."""

    def __init__(self, channels: int = 4, scaling_factor: float = 0.18215) -> None:
        super().__init__()
        self.config = FrozenDict(scaling_factor=scaling_factor, latent_channels=channels)
        self.encoder, self.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z[:, :3] / 20)


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> Vae:
    made = Vae()
    monkeypatch.setattr(decode, "load_vae", lambda name, **kw: made)
    return made


@pytest.fixture(params=WAYS_IN)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(WAYS_IN[request.param](tmp_path))


def model_input(store: Store) -> torch.Tensor:
    """What the model is trained on, posterior noise apart."""
    m = store.manifest
    stored = store.read(np.arange(ROWS)).x[:, : m.shape[0]]
    return (torch.from_numpy(stored) - m.shift) * m.scale


def test_samples_leave_as_the_vae_encoded_them(packed: Store, vae: Vae, tmp_path: Path) -> None:
    z, x, m = torch.from_numpy(raw_latents()), model_input(packed), packed.manifest
    decoded = sample.to_uint8(vae.decode(z).sample)
    torch.testing.assert_close(torch.from_numpy(sample.to_arrays(x, m)), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample.seen(sample.latents(x, m), m), x, rtol=1e-4, atol=1e-4)
    found = decode.Decoder("vae", m, "nearest", torch.device("cpu"))(x)
    assert np.abs(found.astype(int) - decoded).max() <= 1  # at the edge of a level
    np.testing.assert_allclose(of_rows(packed, np.arange(ROWS)), z, atol=0.1)  # noise of deviation 0.01


def test_a_picture_of_the_store_is_the_vaes(packed: Store, vae: Vae, tmp_path: Path) -> None:
    from PIL import Image

    want = tmp_path / "want.png"
    ids = np.linspace(0, ROWS - 1, 16).astype(int)
    sample.save_grid(sample.to_uint8(vae.decode(torch.from_numpy(raw_latents()[ids])).sample), want)
    main(["data", "info", str(packed.path), "--picture", str(tmp_path / "found.png"), "--vae", "vae"])
    found, wanted = (np.asarray(Image.open(p), int) for p in (tmp_path / "found.png", want))
    assert np.abs(found - wanted).max() <= 1


def test_a_preview_does_not_depend_on_the_way_in(tmp_path: Path) -> None:
    stores = []
    for name in ("edm2", "repa", "fast-dit", "write_store"):
        (tmp_path / name).mkdir()
        stores.append(Store(WAYS_IN[name](tmp_path / name)))
    previews = [sample.to_images(model_input(s), s.manifest).astype(int) for s in stores]
    assert previews[0].std() > 10
    for preview in previews[1:]:
        assert np.abs(preview - previews[0]).max() <= 1


def test_runs_exports_and_samples_carry_it(packed: Store, vae: Vae, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(packed.path), train__steps=1, train__checkpoint_every=1), tmp_path / "run")
    way = packed.manifest.latents
    assert way is not None
    assert Run(run.path).manifest().latents == way
    main(["export", str(run.path), "--format", "safetensors", "--out", str(tmp_path / "out")])
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert parse_described(json.loads(file.metadata()["data"]), "", "").latents == way
    assert (f"{way.factor:g} of the VAE's z" in (tmp_path / "out/README.md").read_text()) == way.changed
    for name, more in (("as-is", []), ("decoded", ["--vae", "vae"])):
        arguments = ["--num", "3", "--steps", "2", "--sampler", "ode", "--cfg", "1", "--no-shuffle"]
        main(["sample", str(run.path), *arguments, "--out", str(tmp_path / f"{name}.npz"), *more])
    latents, images = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("as-is", "decoded"))
    model, config, manifest, _ = sample.load_ema(run)
    drawn = sample.draw(model, replace(config, sample=replace(config.sample, steps=2, sampler="ode", cfg=1)),
                        torch.arange(3) % 4, 0)  # fmt: skip
    z = of_vae(drawn / manifest.scale + manifest.shift, manifest)
    np.testing.assert_allclose(latents, z, rtol=1e-4, atol=1e-4)
    assert np.abs(images.astype(int) - sample.to_uint8(vae.decode(z).sample)).max() <= 1


def test_the_statistics_are_said(packed: Store, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "info", str(packed.path)])
    way = packed.manifest.latents
    assert way is not None
    out = capsys.readouterr().out
    assert (f"stored = (z - mean) / std * {way.factor:g}" in out) == way.changed
    assert (f"channel 1: mean {way.mean[1]:+.3f}, std {way.std[1]:.3f}" in out) == any(way.mean)


def test_a_decoder_of_another_space_is_refused(packed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(vae: Vae, m: Manifest = packed.manifest) -> None:
        monkeypatch.setattr(decode, "load_vae", lambda name, **kw: vae)
        decode.Decoder("other", m, "nearest", torch.device("cpu"))

    way = packed.manifest.latents
    assert way is not None
    with pytest.raises(UserError, match="--vae other: its latents have 16 channels, expected the run's 4"):
        opened(Vae(16))
    if way.scaling_factor is not None:
        with pytest.raises(UserError, match=r"its scaling_factor is 0\.13025, expected .* a VAE with 0\.18"):
            opened(Vae(scaling_factor=0.13025))
    own = Vae()
    known = replace(packed.manifest, latents=replace(way, encoder_sha256=encoder_fingerprint(own)))
    torch.nn.init.zeros_(own.decoder.weight)  # ft-mse and ft-ema differ in their decoders only
    opened(own, known)
    opened(own.half(), known)
    torch.nn.init.zeros_(own.encoder.weight)
    with pytest.raises(UserError, match="its encoder is not the one that encoded"):
        opened(own, known)


def test_descriptions_of_earlier_versions(vae: Vae, tmp_path: Path) -> None:
    """They do not say how latents were normalised: of scale 1 nobody can tell, of another one they were not."""
    z = raw_latents()
    for scale in (1.0, 0.18215):
        folder = tmp_path / f"{scale}"
        write_store(folder, kind="samples", x=z, y=LABELS, num_classes=4, scale=scale)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["latents"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        old = Store(folder)
        assert old.manifest.latents is None
        np.testing.assert_allclose(sample.to_arrays(model_input(old), old.manifest), z, rtol=1e-4, atol=1e-5)
    decode.Decoder("vae", old.manifest, "nearest", torch.device("cpu"))
    with pytest.raises(UserError, match="does not say how its latents of scale 1 were normalised"):
        decode.Decoder("vae", Store(tmp_path / "1.0").manifest, "nearest", torch.device("cpu"))


def test_a_run_of_an_earlier_version_goes_on_with_its_data_packed_again(tmp_path: Path) -> None:
    store = moments(tmp_path, "edm2")
    config = tiny(data__path=str(store), train__steps=2, train__checkpoint_every=1, optim__schedule="constant")
    run = train(config, tmp_path / "run")
    values = json.loads(run.config_file.read_text())
    way = values["manifest"].pop("latents")
    run.config_file.write_text(json.dumps(values))
    assert run.manifest().latents is None
    train(replace(config, train=replace(config.train, steps=3)), tmp_path / "run")
    assert json.loads(run.config_file.read_text())["manifest"]["latents"] == way
    values["manifest"]["latents"] = {**way, "factor": 0.25}
    run.config_file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="data's latents"):
        train(replace(config, train=replace(config.train, steps=4)), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mean": [0, 0]}, "mean is"), ({"std": [1, 1, 1, 0]}, "above 0"), ({"factor": 0}, "factor is 0"),
        ({"mean": [0, 0, 0, float("nan")]}, "finite"), ({"encoder_sha256": 3}, "encoder_sha256 is 3"),
        ({"more": 1}, "expected null or an object"), ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
    ],
)  # fmt: skip
def test_damaged_statistics_are_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    write_store(tmp_path / "s", kind="samples", x=raw_latents(), y=LABELS, num_classes=4)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    manifest["latents"] = json.loads(json.dumps(asdict(raw(4)))) | change
    (tmp_path / "s/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=what):
        Store(tmp_path / "s")
