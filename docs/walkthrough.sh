#!/usr/bin/env bash
# Somebody's SiT, fine-tuned with LSEP, sampled, judged, probed, and handed on to diffusers; on a CPU in a few minutes.
#
#   docs/walkthrough.sh [FOLDER] [STEPS] [SAMPLES]        (walkthrough 50 2000)
#
# The weights are random and small, in the form of SiT's files: with real ones the commands are the same, but for
# --form, --num-heads (only for widths that were never published) and --kind.
set -euo pipefail
folder=${1:-walkthrough} steps=${2:-50} samples=${3:-2000}
mkdir "$folder"

echo "== a file as SiT saves it: 4 blocks of width 96, 8 x 8 pixels, 10 classes"
python - "$folder/SiT.pt" <<'PYTHON'
import sys

import torch

from lsep.config import override
from lsep.presets import PRESETS
from lsep.model import SiT
from lsep.weights.exporting import sit_state

sizes = {"model.input_size": 8, "model.in_channels": 1, "model.num_classes": 10}
config = override(PRESETS["quickstart"], sizes)
model = SiT(config)
model.initialize(torch.Generator().manual_seed(0))
torch.save({"ema": sit_state(model.state_dict(), config)}, sys.argv[1])
PYTHON

echo "== import"
lsep import "$folder/SiT.pt" --form sit --num-heads 4 --kind pixels --out "$folder/imported"

echo "== fine-tune with LSEP"
lsep train quickstart --train.init "$folder/imported" --train.steps "$steps" --optim.warmup-steps 10 \
    --train.checkpoint-every "$steps" --train.sample-every 0 --optim.ema-decay 0.9 --run-dir "$folder/run"

echo "== sample"
lsep sample "$folder/run" --num "$samples" --cfg 1.5 --out "$folder/samples.npz"

echo "== evaluate, by the features of a small classifier of digits; Inception's are --features inception"
lsep evaluate "$folder/samples.npz" --reference digits --features lsep.data.digits:features \
    --metrics fid precision recall kid --json "$folder/figures.json"

echo "== probe"
lsep probe "$folder/run" --times 0.2 0.6 --seeds 1

echo "== export, and load it in diffusers"
lsep export "$folder/run" --format diffusers --out "$folder/diffusers"
python - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from lsep.run import Run
from lsep.sample import load_ema

folder = Path(sys.argv[1])
theirs = DiTTransformer2DModel.from_pretrained(folder / "diffusers").eval()
ours = load_ema(Run.existing(folder / "run"))[0]
x, t, y = torch.randn(8, 1, 8, 8), torch.linspace(0, 1, 8), torch.arange(8)
with torch.no_grad():
    a, b = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
error = float((a - b).abs().max() / a.abs().max())
print(f"diffusers' velocity is ours within {error:.1e} of the largest")
assert error < 1e-4
PYTHON
