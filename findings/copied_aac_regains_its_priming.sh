#!/usr/bin/env bash
# Copying AAC packets from MP4 to Matroska moves the sound by 1,024 samples; copying them back the other way does not.
#
# Versions  av 18.1.0 (libavformat 62.12.102, libavcodec 62.28.102), numpy 2.4.6
# Guess     160,000 samples go in, so 160,000 come out (the MP4's own duration says so too). A copy of the packets into
#           another container holds the same sound at the same place, as nothing is encoded again.
# Instead   No way of decoding gives 160,000:
#             - the last AAC frame is decoded whole, 768 samples beyond the duration that the MP4 states;
#             - the encoder's 1,024 samples of priming are hidden in MP4 by an edit list, and in Matroska by a CodecDelay.
#               A packet read from MP4 tells of it by a negative time stamp only; the Matroska muxer moves that to 0 and
#               writes no delay. So the copy decodes to 1,024 samples more, with the click 64 ms later, while the stream
#               still starts at time 0. From Matroska to MP4 the negative time stamp is enough, and nothing moves.
# Seen      written as mp4: 160768 samples, click at 80000, duration field 160000
#           written as mkv: 160768 samples, click at 80000, duration field None
#           mp4 -> mkv:     161792 samples, click at 81024, duration field None
#           mkv -> mp4:     160768 samples, click at 80000, duration field 160768
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PYTHON'
from pathlib import Path

import av
import numpy as np

RATE, LENGTH, CLICK, FRAME = 16_000, 160_000, 80_000, 1_024
sound = np.zeros((1, LENGTH), np.int16)
sound[0, CLICK] = 30_000


def write(path):
    with av.open(path, "w") as out:
        stream = out.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for piece in (frame, None):
            for packet in stream.encode(piece):
                out.mux(packet)


def copy(source, target):
    with av.open(source) as given, av.open(target, "w") as out:
        stream = out.add_stream_from_template(given.streams.audio[0])
        for packet in given.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)


def look(label, path):
    with av.open(path) as given:
        stream = given.streams.audio[0]
        frames = list(given.decode(stream))
        heard = np.concatenate([frame.to_ndarray()[0] for frame in frames])
        click = int(np.abs(heard).argmax())
        assert stream.start_time == 0 and frames[0].pts == 0
        print(f"{label + ':':<15} {heard.size} samples, click at {click}, duration field {stream.duration}")
        return heard.size, click, stream.duration


write("a.mp4")
write("b.mkv")
copy("a.mp4", "a.mkv")
copy("b.mkv", "b.mp4")
whole = -(-LENGTH // FRAME) * FRAME
assert whole == 160_768
assert look("written as mp4", "a.mp4") == (whole, CLICK, LENGTH)
assert look("written as mkv", "b.mkv") == (whole, CLICK, None)
assert look("mp4 -> mkv", "a.mkv") == (whole + FRAME, CLICK + FRAME, None)
assert look("mkv -> mp4", "b.mp4") == (whole, CLICK, whole)

CODEC_DELAY, CLUSTER = bytes.fromhex("56AA"), bytes.fromhex("1F43B675")
heads = {name: Path(name).read_bytes().partition(CLUSTER)[0] for name in ("a.mkv", "b.mkv")}
assert CODEC_DELAY in heads["b.mkv"] and CODEC_DELAY not in heads["a.mkv"]
PYTHON
