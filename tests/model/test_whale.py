"""VITA's sound encoder equals its definition; a clip has the same tokens alone and beside others, and nothing behind it is heard.

The comparison with VITA's own code is in docs/exchange.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.media.audio import feature_rows, num_frames
from model.audio.encoder import AudioEncoder, audio_config, audio_spec
from model.audio.projector import build_audio_projector
from model.config import AudioConfig, AudioProjectorConfig
from model.errors import ConfigError
from model.media_spec import AudioSpec, MediaMeta, num_tokens, row_shape
from model.weights.bases import audio_tensors
from model.weights.materialise import Layer, materialise, parameters_on_meta
from model.weights.projector_files import whole_projector
from tests.support.tiny_audio import wave
from tests.support.vita.plain_sound import adapted, encoded
from tests.support.vita.sound_folder import MELS, WIDTH, save_whale, statistics

CLIPS = [0.085, 0.3, 0.86]
LLM = 48


def parts(folder: Path) -> tuple[AudioEncoder, nn.Module, AudioSpec]:
    """Encoder, projector and spec of a folder as VITA publishes it."""
    audio, projector = AudioConfig(str(folder)), AudioProjectorConfig("vita_conv", path=str(folder))
    with parameters_on_meta():
        encoder = AudioEncoder(audio_config(audio), True)
        adapter = build_audio_projector(projector, encoder.hidden_size, LLM)
    layers = [
        Layer("audio", lambda: audio_tensors(str(folder), encoder), prefix="audio."),
        Layer("projector", lambda: whole_projector(folder, "audio_projector", adapter), prefix="audio_projector."),
    ]
    root = nn.ModuleDict({"audio": encoder, "audio_projector": adapter})
    materialise(root, layers, frozen_dtype=torch.float32, device=torch.device("cpu"))
    return encoder.eval(), adapter.eval(), audio_spec(audio, projector)


def batch_of(waves: list[Tensor], spec: AudioSpec) -> tuple[Tensor, Tensor]:
    rows = [feature_rows(one, spec)[0] for one in waves]
    width = max(row.shape[1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, width - row.shape[1])) for row in rows]), torch.tensor(
        [row.shape[1] for row in rows]
    )


@pytest.mark.parametrize(("chunk", "left"), [(-1, -1), (4, 2), (3, -1)])
def test_it_equals_its_definition_alone_and_in_a_batch(tmp_path: Path, chunk: int, left: int) -> None:
    tensors = save_whale(tmp_path, llm=LLM, chunk=chunk, left=left)
    encoder, adapter, spec = parts(tmp_path)
    waves = [wave(seconds) for seconds in CLIPS]
    values, lengths = batch_of(waves, spec)
    with torch.no_grad():
        rows = encoder(values, lengths)
        tokens = adapter(rows, encoder.valid_rows(lengths))
    for i, one in enumerate(waves):
        meta = MediaMeta(num_frames=num_frames(len(one), spec))
        expected = encoded(tensors, feature_rows(one, spec)[0].T, chunk, left)
        torch.testing.assert_close(rows[i, : len(expected)], expected, rtol=0, atol=1e-5)
        count = num_tokens(spec, meta)
        assert count == -(-len(expected) // 2) and count == [1, 3, 10][i]
        torch.testing.assert_close(tokens[i, :count], adapted(tensors, expected), rtol=0, atol=1e-5)


def test_what_follows_from_its_settings(tmp_path: Path) -> None:
    save_whale(tmp_path, chunk=4, left=16, dither=0.5)
    spec = audio_spec(AudioConfig(str(tmp_path)), AudioProjectorConfig("vita_conv"))
    assert (spec.num_mels, spec.n_fft, spec.hop, spec.dither, spec.full_window) == (MELS, 400, 160, 0.5, False)
    assert spec.strides == (2, 2, 2) and spec.kernels == (3, 3, 1) and row_shape(spec) == (MELS, 7)
    means, variances = statistics()
    assert spec.means == pytest.approx(means) and spec.scales == pytest.approx([v**-0.5 for v in variances])
    value = audio_config(AudioConfig(str(tmp_path)))
    assert (value["chunk_size"], value["left_chunks"], value["hidden_size"]) == (4, 16, WIDTH)


def test_nothing_behind_a_clip_is_heard_and_all_of_it_is(tmp_path: Path) -> None:
    save_whale(tmp_path, chunk=2, left=0)
    encoder, adapter, _ = parts(tmp_path)
    values = torch.randn(2, MELS, 43, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([43, 23])
    dirty = values.clone()
    dirty[1, :, 23:] = float("nan")
    with torch.no_grad():
        clean, marred = (adapter(encoder(v, lengths), encoder.valid_rows(lengths)) for v in (values, dirty))
    assert torch.equal(clean[0], marred[0]) and torch.equal(clean[1, :3], marred[1, :3])
    assert encoder.valid_rows(lengths).tolist() == [10, 5]  # type: ignore[union-attr]
    heard = values[:1, :, :43].clone().requires_grad_()
    adapter(encoder(heard, lengths[:1]), encoder.valid_rows(lengths[:1])).square().sum().backward()
    assert heard.grad is not None and heard.grad.abs().sum((0, 1)).gt(0).all()
    assert [name for name, p in [*encoder.named_parameters(), *adapter.named_parameters()] if not p.requires_grad] == []
    assert not [*encoder.named_buffers(), *adapter.named_buffers()]


def test_gradients_of_one_row_are_the_same_in_bfloat16(tmp_path: Path) -> None:
    """A strided convolution over a single position once had stale memory for a gradient."""
    save_whale(tmp_path)
    encoder, adapter, _ = parts(tmp_path)
    values, lengths = torch.randn(1, MELS, 7, generator=torch.Generator().manual_seed(2)), torch.tensor([7])
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        both = nn.ModuleList([encoder, adapter]).to(dtype).requires_grad_()
        both.zero_grad()
        adapter(encoder(values.to(dtype), lengths), encoder.valid_rows(lengths)).float().square().sum().backward()
        found.append([p.grad.float().clone() for p in both.parameters() if p.grad is not None])
    for exact, first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()) + 1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "positionwise-layer-type: linear",
            "positionwise-layer-type: conv1d",
            r"layer-type = 'conv1d' is not supported; .* 'linear'",
        ),
        ("subsampling-rate: 4", "subsampling-rate: 6", r"subsampling-rate = 6 is not supported; it must be 4"),
        (
            "transformer-linear-units: 40",
            "transformer-linear-units: {a: 1}",
            r"line 32: .*linear-units has a form that is not read",
        ),
        ("      transformer-num-blocks: 2\n", "", r"train.yaml has no encoder_conf.para_conf.transformer.transformer-num-blocks"),
        ("num_mel_bins: 16", "num_mel_bins: 80", r"global_cmvn holds sums of 16 and 16 bands, and train.yaml makes 80"),
    ],
)
def test_settings_of_another_encoder_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    save_whale(tmp_path)
    text = (tmp_path / "train.yaml").read_text()
    assert old in text
    (tmp_path / "train.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        audio_config(AudioConfig(str(tmp_path)))


def test_statistics_may_be_json_and_broken_ones_are_refused(tmp_path: Path) -> None:
    save_whale(tmp_path, json="true")
    means, variances = statistics()
    squares = [7 * (variance + mean * mean) for mean, variance in zip(means, variances)]
    stored = {"mean_stat": [7 * mean for mean in means], "var_stat": squares, "frame_num": 7}
    (tmp_path / "global_cmvn").write_text(str(stored).replace("'", '"'))
    assert audio_config(AudioConfig(str(tmp_path)))["cmvn_means"] == pytest.approx(means)
    (tmp_path / "global_cmvn").write_text("[ 1 2 ]")
    with pytest.raises(ConfigError, match="global_cmvn is not the JSON that is_json_cmvn announces"):
        audio_config(AudioConfig(str(tmp_path)))
    save_whale(tmp_path)
    for broken in ("", "[ 1 x 3 0 ]", "\0B binary"):
        (tmp_path / "global_cmvn").write_text(broken)
        with pytest.raises(ConfigError, match="global_cmvn"):
            audio_config(AudioConfig(str(tmp_path)))
