"""The loop that samples, decodes and hands over: overlap, memory, short batches."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from eval.generate.producer import Producer
from eval.generate.sampler import LatentSampler
from eval.networks.load import Decoder
from eval.networks.transfer import to_device
from shards.errors import UserError
from train.models.normalizer import LatentNormalizer

CPU = torch.device("cpu")


class Still(nn.Module):
    """A field at rest, so that latents are the noise; calls `before` with each batch."""

    def __init__(self, before=lambda x: None):
        super().__init__()
        self.before = before

    def forward(self, x, t, y):
        self.before(x)
        return torch.zeros_like(x)


def _decode(tokens):
    """Pixels [B, 3, 2, 2] of tokens [B, 4, 3]."""
    return tokens.transpose(1, 2).unflatten(2, (2, 2)) * 0.2 + 0.5


def _producer(model, decode=_decode, device=CPU, **changes):
    sampler = LatentSampler(
        model=model, latent_shape=(3, 2, 2), num_classes=1, classes=(0,), points=2, seed=0
    )
    return Producer(
        sampler=sampler,
        normalizer=LatentNormalizer(None, torch.ones(3, 2, 2)).to(device),
        decoder=Decoder(network=decode, precision="fp32", image_size=(2, 2)),
        device=device,
        **changes,
    )


def _collected(producer, numbers):
    found = {}

    def sink(batch, images):
        found.update(zip(batch.tolist(), images, strict=True))

    producer.produce(np.asarray(numbers), sink)
    return found


def test_every_number_is_handed_over_once_with_its_own_image():
    numbers = [8, 3, 5, 1, 9]
    one, other = (_collected(_producer(Still(), batch_size=size), numbers) for size in (2, 5))
    assert list(one) == numbers
    assert list(other) == numbers
    for number in numbers:
        np.testing.assert_array_equal(one[number], other[number])
    assert len({image.tobytes() for image in one.values()}) == 5


def test_the_next_batch_is_made_while_the_last_one_is_handed_over_and_no_further_one():
    begun, decoded, handed = [], threading.Event(), []

    def decode(tokens):
        if len(begun) == 2:
            decoded.set()
        return _decode(tokens)

    def sink(batch, images):
        if not handed:
            # Would wait in vain if the next batch was begun only after this one is written.
            assert decoded.wait(20)
            time.sleep(0.2)
        assert len(begun) <= len(handed) + 2
        handed.append(batch)

    _producer(Still(begun.append), decode, batch_size=2).produce(np.arange(12), sink)
    assert [len(batch) for batch in handed] == [2] * 6


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    def before(x):
        if len(x) > 3:
            raise torch.OutOfMemoryError("too large")

    whole = _collected(_producer(Still()), range(7))
    halved = _collected(_producer(Still(before)), range(7))
    for number in range(7):
        np.testing.assert_array_equal(whole[number], halved[number])


def test_a_batch_size_that_was_asked_for_and_does_not_fit_is_refused():
    def before(x):
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(UserError, match=r"a batch of 4 samples does not fit .* smaller --batch-size"):
        _collected(_producer(Still(before), batch_size=4), range(7))


def _too_many(limit):
    """A decoder that has room for so many."""

    def decode(tokens):
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("too large")
        return _decode(tokens)

    return decode


def test_a_batch_that_cannot_be_decoded_is_halved_until_it_can():
    numbers = list(range(40))
    whole = _collected(_producer(Still()), numbers)
    sizes, found = [], {}

    def sink(batch, images):
        sizes.append(len(batch))
        assert not found.keys() & set(batch.tolist())
        found.update(zip(batch.tolist(), images, strict=True))

    _producer(Still(), _too_many(5)).produce(np.asarray(numbers), sink)
    assert sizes == [4] * 10
    assert list(found) == numbers
    for number in numbers:
        np.testing.assert_array_equal(whole[number], found[number])


def test_a_late_batch_that_cannot_be_decoded_costs_no_earlier_one():
    handed = []

    def sink(batch, images):
        if len(handed) > 4 and len(batch) > 3:
            raise torch.OutOfMemoryError("too large")
        handed.extend(batch.tolist())

    _producer(Still()).produce(np.arange(70), sink)
    assert handed == list(range(70))


@pytest.mark.parametrize(("batch_size", "limit", "said"), [(4, 3, 4), (None, 0, 1)])
def test_a_batch_that_cannot_be_made_smaller_and_not_decoded_is_refused(batch_size, limit, said):
    with pytest.raises(UserError, match=rf"a batch of {said} samples does not fit .* smaller --batch-size"):
        _collected(_producer(Still(), _too_many(limit), batch_size=batch_size), range(7))


def test_progress_counts_what_was_handed_over():
    with tqdm(total=7, file=io.StringIO()) as progress:
        _producer(Still(), _too_many(3)).produce(np.arange(7), lambda *batch: None, progress)
        assert progress.n == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_batches_are_decoded_in_one_stream_that_is_not_the_samplers():
    streams = []

    def decode(tokens):
        streams.append(torch.cuda.current_stream().cuda_stream)
        return _decode(tokens)

    producer = _producer(Still().cuda(), decode, batch_size=1, device=torch.device("cuda"))
    _collected(producer, range(3))
    assert len(streams) == 3
    assert len(set(streams)) == 1
    assert streams[0] != torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize(
    ("count", "batch_size", "sampled", "decoded"),
    [
        (7, 3, [3, 3, 3], [3, 3, 3]),
        (10, 8, [5, 5], [5, 5]),
        (100, 50, [50, 50], [25, 25] * 2),
        (34, 33, [17, 17], [17, 17]),
        (71, 36, [36, 36], [18, 18] * 2),
        (33, 33, [33], [17, 17]),
    ],
)
def test_compiled_networks_see_one_batch_size_each(count, batch_size, sampled, decoded):
    sizes = {"sampled": [], "decoded": []}

    def decode(tokens):
        sizes["decoded"].append(len(tokens))
        return _decode(tokens)

    model = Still(lambda x: sizes["sampled"].append(len(x)))
    filled = _collected(_producer(model, decode, batch_size=batch_size, fill_batches=True), range(count))
    assert sizes == {"sampled": sampled, "decoded": decoded}
    plain = _collected(_producer(Still(), batch_size=batch_size), range(count))
    assert list(filled) == list(plain) == list(range(count))
    for number in range(count):
        np.testing.assert_array_equal(filled[number], plain[number])


def test_a_batch_makes_its_images_of_tensors_without_values():
    # Tensors on the meta device have none: asking for one, or branching on one, raises.
    meta = torch.device("meta")
    guided = {"guidance": "cfg", "scale": 1.5, "interval": (0.3, 0.9), "points": 5, "labels": "random"}
    for changes in ({}, guided, guided | {"halves": "separate"}, {"method": "heun", "points": 3}):
        sampler = LatentSampler(
            model=Still(), latent_shape=(3, 2, 2), num_classes=2, classes=(0, 1), **{"points": 2, **changes}
        )
        latents = sampler.latents(to_device(torch.arange(4), meta))
        assert latents.shape == (4, 3, 2, 2)
        assert latents.device == meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sampling_and_decoding_a_batch_waits_for_no_device(waiting_is_an_error):
    producer = _producer(Still().cuda(), batch_size=4, device=torch.device("cuda"))
    numbers = np.arange(4)
    producer._queued(numbers, 4)  # what is made once may wait
    torch.cuda.synchronize()
    with waiting_is_an_error():
        queued = producer._queued(numbers, 4)
    queued.arrived.synchronize()
    found = _collected(producer, numbers)
    np.testing.assert_array_equal(queued.pixels.numpy(), np.stack([found[number] for number in numbers]))


def test_a_failing_sink_stops_the_loop():
    def sink(batch, images):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk is full"):
        _producer(Still(), batch_size=1).produce(np.arange(5), sink)
