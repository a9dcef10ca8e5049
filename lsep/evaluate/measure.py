"""All metrics of a set of samples against a reference, as one dictionary that says what each figure rests on."""

from collections.abc import Sequence
from typing import Any

import torch

from lsep import __version__
from lsep.errors import UserError
from lsep.evaluate import METRICS, Metric
from lsep.evaluate.extract import Extracted, extract
from lsep.evaluate.features import Extractor
from lsep.evaluate.frechet import Gaussian, Moments, bootstrap, frechet_distance, interval
from lsep.evaluate.images import Images
from lsep.evaluate.inception_score import CHUNK, inception_scores
from lsep.evaluate.kid import SUBSET_SIZE, SUBSETS, kernel_distance
from lsep.evaluate.neighbours import Distances, K, precision_recall
from lsep.evaluate.reference import Reference, open_reference


def evaluate(
    samples: Images,
    reference: str,
    extractor: Extractor,
    metrics: Sequence[Metric] | None = None,
    resamples: int = 0,
    distances: Distances = "fp32",
    batch_size: int = 64,
) -> dict[str, Any]:
    """Measure `samples` against the reference at a path; `metrics` None is all that the features allow.

    resamples: of the bootstrap interval of the Frechet distance, 0 for none. Raises UserError where a metric asked for
    cannot be had.
    """
    wanted = METRICS if metrics is None else metrics
    neighbours = {"precision", "recall", "kid"}
    known = open_reference(reference, extractor, batch_size, bool(neighbours & set(wanted)))
    found = extract(samples, extractor, batch_size, logits="is" in wanted)
    chosen = [m for m in METRICS if m in wanted and _possible(m, found, known, asked=metrics is not None)]
    values: dict[str, Any] = {}
    if "fid" in chosen:
        values["fid"] = _frechet(found.moments, known.pool, "mu")
        if resamples:
            values["fid"] |= _interval(values["fid"]["value"], found, known, resamples)
        if known.floor is not None:
            values["fid"]["floor"] = known.floor
    if "sfid" in chosen:
        assert found.spatial is not None and known.spatial is not None
        values["sfid"] = _frechet(found.spatial, known.spatial, "mu_s")
    if "is" in chosen:
        assert found.logits is not None
        scores = inception_scores(found.logits)
        values["is"] = {"value": float(scores.mean()), "std": float(scores.std(correction=0)), "chunks": len(scores)}
    values |= _neighbours(chosen, found, known, distances)
    return {
        "samples": samples.source,
        "num_samples": samples.count,
        "reference": known.source,
        "num_reference": known.count,
        "num_reference_features": None if known.features is None else len(known.features),
        "extractor": extractor.identity.name,
        "source_sha256": extractor.identity.source_sha256,
        "weights_sha256": extractor.identity.weights_sha256,
        "precision_of_features": extractor.precision,
        "device": extractor.device.type,
        "metrics": {_key(m, extractor): v for m, v in values.items()},
        "shape": list(samples.shape),
        "shape_of_reference": None if known.shape is None else list(known.shape),
        "warnings": [
            *samples.notes,
            *known.notes,
            *_sizes(samples, known),
            *_warnings(found, known, extractor, values),
        ],
        "lsep": __version__,
        "torch": torch.__version__,
    }


def _key(metric: str, extractor: Extractor) -> str:
    """fid and sfid are names of Inception's; over other features they are Frechet distances, fd and sfd."""
    return metric if extractor.inception else {"fid": "fd", "sfid": "sfd"}.get(metric, metric)


def _possible(metric: Metric, found: Extracted, known: Reference, asked: bool) -> bool:
    """Whether the features allow a metric; raises UserError for one that was `asked` for and is not allowed."""
    missing = None
    if metric == "sfid" and found.spatial is None:
        missing = "the extractor gives no spatial features"
    elif metric == "sfid" and known.spatial is None:
        missing = f"the reference {known.source} has no spatial statistics mu_s and sigma_s"
    elif metric == "is" and found.logits is None:
        missing = "the extractor gives no logits"
    elif metric in ("precision", "recall", "kid") and known.features is None:
        missing = f"the reference {known.source} holds neither images nor features"
    if missing and asked:
        raise UserError(f"--metrics holds {metric!r}, but {missing}")
    return missing is None


def _frechet(found: Moments, known: Gaussian, name: str) -> dict[str, Any]:
    if len(found.mean) != known.width:
        raise UserError(
            f"the reference's {name} is of width {known.width}, expected {len(found.mean)} as these features"
        )
    return {"value": frechet_distance(found.gaussian(), known)}


def _interval(value: float, found: Extracted, known: Reference, resamples: int) -> dict[str, Any]:
    assert found.features is not None
    spread = bootstrap(found.features, known.pool, resamples)
    return {"interval_95": interval(value, spread), "std": float(spread.std()), "resamples": resamples}


def _neighbours(
    chosen: Sequence[Metric], found: Extracted, known: Reference, distances: Distances
) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    samples, reference = found.features, known.features
    if samples is None or reference is None or not {"precision", "recall", "kid"} & set(chosen):
        return values
    reference = reference.to(samples.dtype)
    if {"precision", "recall"} & set(chosen):
        pair = precision_recall(samples, reference, distances)
        for name, value in zip(("precision", "recall"), pair, strict=True):
            if name in chosen:
                values[name] = {"value": value, "neighbours": K, "distances": distances}
    if "kid" in chosen:
        kids = kernel_distance(samples, reference)
        size = min(SUBSET_SIZE, len(samples), len(reference))
        values["kid"] = {
            "value": float(kids.mean()), "std": float(kids.std(correction=0)), "subsets": SUBSETS, "subset_size": size
        }  # fmt: skip
    return values


def _sizes(samples: Images, known: Reference) -> list[str]:
    """A warning where samples and reference differ in size: an extractor that resizes gives figures for both."""
    if known.shape in (None, samples.shape):
        return []
    kind = "C x H x W" if samples.latents else "H x W x C"
    own, theirs = (" x ".join(map(str, shape or ())) for shape in (samples.shape, known.shape))
    return [f"the samples are of {own} ({kind}), the reference of {theirs}: they differ before any feature is computed"]


def _warnings(found: Extracted, known: Reference, extractor: Extractor, values: dict[str, Any]) -> list[str]:
    warnings = []
    widths = {"fid": len(found.moments.mean), "sfid": len(found.spatial.mean) if found.spatial else 0}
    for metric, width in widths.items():
        if metric in values and found.count <= width:
            warnings.append(
                f"{_key(metric, extractor)}: {found.count} samples for {width} features: the covariance has no full "
                "rank, and the distance is far above that of many samples"
            )
    if known.precision not in (None, extractor.precision):
        warnings.append(f"the reference's features are {known.precision}, those of the samples {extractor.precision}")
    if "kid" in values and values["kid"]["subset_size"] < SUBSET_SIZE:
        warnings.append(f"kid: subsets of {values['kid']['subset_size']}, where {SUBSET_SIZE} is the custom")
    if "is" in values and found.count % CHUNK and found.count > CHUNK:
        warnings.append(f"is: the last chunk has {found.count % CHUNK} of {CHUNK} images, as in ADM's evaluator")
    return warnings


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    sha = result["weights_sha256"] or result["source_sha256"]
    of_reference = result["num_reference"] or "an unknown number of"
    lines = [
        f"samples    {result['samples']}, {result['num_samples']} images",
        f"reference  {result['reference']}, {of_reference} images",
        f"features   {result['extractor']}, {result['precision_of_features']}, sha256 {sha[:16] if sha else 'unknown'}",
        "",
    ]
    for name, found in result["metrics"].items():
        notes = []
        if "interval_95" in found:
            low, high = found["interval_95"]
            notes.append(f"95 % from {low:.4f} to {high:.4f} ({found['resamples']} resamples)")
        elif "std" in found:
            notes.append(f"+- {found['std']:.6f}")
        if "floor" in found:
            notes.append(f"floor {found['floor']:.4f} (the reference's halves)")
        lines.append(f"{name:10} {found['value']:12.6f}  {'; '.join(notes)}".rstrip())
    return "\n".join(lines + [f"warning: {w}" for w in result["warnings"]])
