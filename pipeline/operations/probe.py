"""`pipeline probe`: how well a store's representation predicts its classes."""

import json
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import log
from pipeline.operations.row_features import row_features, unit_length
from pipeline.settings.operations import ProbeConfig
from shards import Store, UsageError, open_store, permutation

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""k-NN by cosine similarity s with weights exp(s / T). Source: DINO, arXiv 2104.14294, section 4."""
REGULARISATION = 0.1
"""C of the logistic regression, on features of mean 0 and std 1."""
_ITERATIONS = 300
_HELD_OUT = 5
"""One row in so many is held out."""
_AT_ONCE = 1024


def probe(config: ProbeConfig) -> None:
    """Print top-1 accuracy of a linear probe and of nearest neighbours on held-out rows.

    Raises:
        UserError: If the store has no labels, no class tokens where they are asked for, or too few rows.
    """
    facts = probe_facts(config)
    text = json.dumps(facts, indent=1, ensure_ascii=False) if config.json else as_text(facts)
    sys.stdout.write(text + "\n")


def probe_facts(config: ProbeConfig) -> dict[str, Any]:
    """Measure what `pipeline probe` prints, as plain JSON values."""
    store = open_store(config.store, follow_links=config.follow_links)
    rows = _chosen_rows(config, store)
    labels = store.labels[rows].astype(np.int64)
    count = len(rows) // _HELD_OUT
    ascending = np.argsort(rows)
    features = np.empty((len(rows), store.width), np.float32)
    features[ascending] = row_features(store, rows[ascending], config.features, config.view)
    held, known = features[:count], features[count:]
    held_labels, known_labels = labels[:count], labels[count:]
    classes = np.unique(known_labels)
    if len(classes) < 2:
        raise UsageError(
            f"{store.path} has rows of {len(classes)} class to learn from, and there is nothing to tell apart; "
            "give a store of several classes, or more --rows"
        )
    log(f"{len(rows)} rows read; fitting a linear probe to {len(known)} of {len(classes)} classes")
    guessed, iterations = _linear(known, known_labels, held)
    neighbours = _nearest(known, known_labels, held)
    return {
        "store": str(config.store),
        "encoder_id": store.recipe.encoder.id,
        "view": config.view or store.views[0],
        "features": config.features,
        "width": store.width,
        "seed": config.seed,
        "rows": {"fitted": len(known), "held_out": count},
        "classes": len(classes),
        "largest_class": float(np.bincount(held_labels).max() / count),
        "linear": {
            **_score(guessed, held_labels),
            "regularisation": REGULARISATION,
            "iterations": iterations,
            "converged": iterations < _ITERATIONS,
        },
        "neighbours": {
            **_score(neighbours, held_labels),
            "k": min(NEIGHBOURS, len(known)),
            "temperature": TEMPERATURE,
        },
    }


def _chosen_rows(config: ProbeConfig, store: Store) -> NDArray[np.int64]:
    """Return labelled rows in an order drawn by seed; the first fifth is held out."""
    if config.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {config.rows}")
    labelled = store.valid_rows[store.labels[store.valid_rows] >= 0]
    if store.num_classes == 0 or not len(labelled):
        raise UsageError(f"{store.path} has no labels, so there are no classes to tell apart")
    order = permutation(len(labelled), seed=config.seed, stream="probe")
    rows: NDArray[np.int64] = labelled[order[: config.rows]]
    if len(rows) < 2 * _HELD_OUT:
        raise UsageError(f"a probe needs at least {2 * _HELD_OUT} labelled rows, got {len(rows)}")
    return rows


def _linear(
    known: NDArray[np.float32], labels: NDArray[np.int64], held: NDArray[np.float32]
) -> tuple[NDArray[np.int64], int]:
    """Return labels that a logistic regression gives held-out rows, and how many iterations its fit took."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError(
            "a linear probe needs scikit-learn, which is not installed; run `pip install -e '.[probe]'`"
        ) from error
    mean, std = known.mean(axis=0), known.std(axis=0)
    std[std == 0] = 1
    model = LogisticRegression(C=REGULARISATION, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result
        model.fit((known - mean) / std, labels)
    guessed: NDArray[np.int64] = model.predict((held - mean) / std)
    return guessed, int(model.n_iter_.max())


def _nearest(
    known: NDArray[np.float32], labels: NDArray[np.int64], held: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return labels that the nearest of the known rows give held-out rows."""
    classes, index = np.unique(labels, return_inverse=True)
    known, held = unit_length(known), unit_length(held)
    k = min(NEIGHBOURS, len(known))
    guessed = np.empty(len(held), np.int64)
    for first in range(0, len(held), _AT_ONCE):
        similarity = held[first : first + _AT_ONCE] @ known.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / TEMPERATURE)
        votes = np.zeros((len(similarity), len(classes)))
        np.add.at(votes, (np.arange(len(similarity))[:, None], index[nearest]), weights)
        guessed[first : first + len(similarity)] = classes[votes.argmax(axis=1)]
    return guessed


def _score(guessed: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    top1 = float((guessed == labels).mean())
    return {"top1": top1, "standard_error": float(np.sqrt(top1 * (1 - top1) / len(labels)))}


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts for people, a line each."""
    rows, linear, nearest = facts["rows"], facts["linear"], facts["neighbours"]
    what = "tokens averaged over positions" if facts["features"] == "pooled" else "class tokens"
    fitted = f"logistic regression, C {linear['regularisation']}, {linear['iterations']} iterations"
    if not linear["converged"]:
        fitted += ", NOT CONVERGED"
    return "\n".join(
        [
            f"store      {facts['store']}, view {facts['view']}, {what}, {facts['width']} channels",
            f"rows       {rows['fitted']} fitted, {rows['held_out']} held out (seed {facts['seed']}), "
            f"{facts['classes']} classes, the largest {facts['largest_class']:.1%} of those held out",
            f"linear     top-1 {linear['top1']:.2%} ± {linear['standard_error']:.2%} ({fitted})",
            f"neighbours top-1 {nearest['top1']:.2%} ± {nearest['standard_error']:.2%} "
            f"({nearest['k']} nearest by cosine, temperature {nearest['temperature']})",
        ]
    )
