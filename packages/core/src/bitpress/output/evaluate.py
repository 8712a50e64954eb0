"""How well a model predicts a text, and how far its predictions are from another's: block by block,
in bounded memory.

Both models go through their blocks side by side, one block in memory at a time; logits are made for
a few tokens at a time.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint.layer_names import block_index
from bitpress.errors import CheckpointError, VerificationError
from bitpress.modeling import metrics
from bitpress.modeling.attention import watched_attention
from bitpress.modeling.block_runner import BlockRunner, RunnableModel
from bitpress.modeling.capture import open_head
from bitpress.modeling.decoder import DecoderOptions
from bitpress.modeling.float16_range import Float16Watch
from bitpress.modeling.tokens import EvaluationText
from bitpress.output.manifest import Check
from bitpress.planning import memory_estimate
from bitpress.runtime import memory
from bitpress.runtime.progress import ReportProgress, in_block

# What a model that answers NaN, or infinity, tells of itself.
DAMAGED = (
    "the model answers NaN on this text: its weights are damaged, or the text is none of its kind"
)


@frozen
class _Sums:
    """Figures of a comparison, as sums over tokens.

    Attributes:
        nll: -log q of the tokens that follow, q being what the model expects.
        reference_nll: -log p of them, p being what the reference expects.
        kl: Σ p (log p - log q).
        num_agreements: tokens for which both expect the same token most.
    """

    nll: float
    reference_nll: float
    kl: float
    num_agreements: int


def evaluate(
    models: Sequence[RunnableModel],
    text: EvaluationText,
    options: DecoderOptions,
    folder: Path | None,
    report_progress: ReportProgress,
) -> Check:
    """The figures of a model on a text, and beside a reference where one is given.

    KL is the mean over tokens of Σ p (log p - log q), p being what the reference expects; top-1 the
    share of tokens whose most likely successor is the same.

    Args:
        models: the model, or the model and its reference.
        folder: where hidden states are kept; None keeps them in memory.
        report_progress: is given the bytes of every block that was run, in float32.

    Raises:
        CheckpointError: transformers cannot build a model, the two are unlike, or the reference or
            the only model answers NaN.
        VerificationError: the model answers NaN, and its reference does not.
    """
    batch_size = max(memory_estimate.BATCH_TOKENS // text.input_ids.shape[1], 1)
    batches = torch.split(text.input_ids, batch_size)
    targets = torch.split(text.target_ids, batch_size)
    with torch.no_grad(), watched_attention():
        report_progress(0, "building the model and running its embeddings")
        runners = [BlockRunner(model, batches, options, folder) for model in models]
        if len({len(runner) for runner in runners}) > 1:
            raise CheckpointError(
                f"{models[0].checkpoint.folder}: the models have not the same number of blocks: "
                "not one's result"
            )

        drift = []
        float16_watch = Float16Watch()
        for index in range(len(runners[0])):
            report_block = in_block(report_progress, index, len(runners[0]))
            report_block(0)
            for model, runner in zip(models, runners, strict=True):
                name = f"{model.container}.{index}"
                block = runner.load_block(index)
                # the reference stands for the same numbers, and one line is enough
                if model is models[0]:
                    float16_watch.watch(block, name)
                runner.run(block, runner.take_calls(index), range(len(batches)))
                report_block(_count_block_bytes(block))
                del block
                memory.release_freed_memory()
            if len(runners) > 1:
                drift.append(_measure_drift(*runners))
        report_progress(0, "comparing predictions")
        sums = _compare(models, runners, targets)
    _require_finite(models, sums)
    if warning := float16_watch.describe():
        warnings.warn(warning, stacklevel=2)
    return _summarize(sums, text, drift)


def count_bytes(models: Sequence[RunnableModel]) -> int:
    """The bytes that `evaluate` reports in all: those of all blocks in float32."""
    return memory_estimate.NUMBER_BYTES * sum(
        entry.numel
        for model in models
        for entry in model.checkpoint.entries.values()
        if block_index(entry.name, model.container) is not None
    )


def _count_block_bytes(block: nn.Module) -> int:
    """Bytes of a block in float32."""
    num_weights = sum(parameter.numel() for parameter in block.parameters())
    return memory_estimate.NUMBER_BYTES * num_weights


def _measure_drift(runner: BlockRunner, reference: BlockRunner) -> float:
    """||h - h'|| / ||h'|| of the hidden states h of a model, and h' of its reference."""
    squared_error = squared_norm = 0.0
    for number in range(len(runner.hidden_states)):
        error, norm = metrics.squared_distance(runner.tokens(number), reference.tokens(number))
        squared_error += error
        squared_norm += norm
    return metrics.relative_error(squared_error, squared_norm)


def _compare(
    models: Sequence[RunnableModel], runners: Sequence[BlockRunner], targets: Sequence[Tensor]
) -> _Sums:
    """Compare what the models expect to follow each token, once all blocks have been run.

    Args:
        targets: by batch the tokens that follow, (sequences, length) int64.
    """
    nll = reference_nll = kl = 0.0
    num_agreements = 0
    batches = ([runner.tokens(number) for runner in runners] for number in range(len(targets)))
    with contextlib.ExitStack() as stack:
        opened = runners[:1] if _share_a_head(models) else runners
        heads = [
            stack.enter_context(open_head(runner.decoder, runner.extra_outputs))
            for runner in opened
        ]
        if len(heads) < len(runners):
            heads *= len(runners)

        for number, chunk, log_probabilities in metrics.compare_logits(batches, heads):
            log_q, *references = log_probabilities
            target_ids = targets[number].flatten()[chunk].to(log_q.device)
            is_target = target_ids != metrics.NO_TARGET
            if not is_target.all():
                log_q, target_ids = log_q[is_target], target_ids[is_target]
                references = [log_p[is_target] for log_p in references]
            nll += metrics.negative_log_likelihood(log_q, target_ids)
            for log_p in references:
                reference_nll += metrics.negative_log_likelihood(log_p, target_ids)
                num_agreements += metrics.count_agreements(log_p, log_q)
                kl += metrics.kl_divergence(log_p, log_q)
    return _Sums(nll, reference_nll, kl, num_agreements)


def _share_a_head(models: Sequence[RunnableModel]) -> bool:
    """Whether all that lies outside the blocks is the same to the byte, so that one copy in memory
    does for all models.
    """
    outside = [
        {
            name: entry
            for name, entry in model.checkpoint.entries.items()
            if block_index(name, model.container) is None
        }
        for model in models
    ]
    specs = [{name: entry.spec for name, entry in entries.items()} for entries in outside]
    if any(spec != specs[0] for spec in specs):
        return False
    readers = [model.reader for model in models]
    return all(
        torch.equal(chunk, other_chunk)
        for reader, others in zip(readers[1:], outside[1:], strict=True)
        for name, entry in outside[0].items()
        for chunk, other_chunk in zip(
            readers[0].chunks(entry), reader.chunks(others[name]), strict=True
        )
    )


def _require_finite(models: Sequence[RunnableModel], sums: _Sums) -> None:
    """See that the models answer with numbers.

    Raises:
        VerificationError: the model answers NaN where its reference does not.
        CheckpointError: the only model does, or the reference.
    """
    folders = [model.checkpoint.folder for model in models]
    if len(models) > 1 and not math.isfinite(sums.reference_nll):
        raise CheckpointError(f"{folders[1]}: {DAMAGED}")
    if not math.isfinite(sums.nll):
        if len(models) == 1:
            raise CheckpointError(f"{folders[0]}: {DAMAGED}")
        raise VerificationError(
            f"{folders[0]}: the model answers NaN on this text, and {folders[1]} does not: it was "
            "damaged by compression, and is of no use"
        )
    if not math.isfinite(sums.kl):
        raise CheckpointError(
            f"{folders[0]}: its KL divergence is infinite: it rules out tokens that {folders[1]} "
            "expects"
        )


def _summarize(sums: _Sums, text: EvaluationText, drift: Sequence[float]) -> Check:
    """Means over tokens; those of a comparison where there is a drift."""
    num_tokens = int((text.target_ids != metrics.NO_TARGET).sum())
    perplexity = metrics.perplexity(sums.nll / num_tokens)
    check = Check(text.source, text.digest, num_tokens, text.input_ids.shape[1], perplexity)
    if not drift:
        return check
    return attrs.evolve(
        check,
        source_perplexity=metrics.perplexity(sums.reference_nll / num_tokens),
        rise=(sums.nll - sums.reference_nll) / num_tokens,
        kl=sums.kl / num_tokens,
        top1=sums.num_agreements / num_tokens,
        drift=tuple(drift),
    )
