#!/usr/bin/env bash
# In an MP4 cut without encoding, the key frame that all shown pictures need is marked "discard".
#
# Versions  av 18.1.0 (libavformat 62.12.102, libavcodec 62.28.102), numpy 2.4.6
# Guess     Packets with `is_discard` may be thrown away. The first packet that is left is a key frame, since decoding
#           must start at one; and the stream's number of frames is the number of pictures it shows.
# Instead   A copy of the packets, moved by -0.5 s (what a cut at 0.5 s does), keeps the five pictures before the cut:
#           the edit list hides them, but the sixth is a difference from them. The demuxer flags all five as discard, the
#           key frame among them. Decoding everything shows 15 pictures. Decoding only the packets without the flag
#           raises nothing and shows 10: all up to the next key frame, a third of the clip, are gone. So is a preview that
#           asks the decoder for key frames only: its first picture lies at 0.5 s, not at 0. `frames` says 20.
# Seen      packets       20, of them discarded 5, key frames at -0.5 (discarded) and 0.5
#           all decoded   15 pictures, from 0.0 s
#           without flag  15 packets, 10 pictures, from 0.5 s
#           key frames    1 picture, from 0.5 s
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PYTHON'
from fractions import Fraction

import av
import numpy as np

CUT = Fraction(1, 2)

# Two seconds, ten pictures a second, a key frame a second, each picture lighter than the one before.
with av.open("whole.mp4", "w") as out:
    options = {"g": "10", "bf": "0", "sc_threshold": "0", "crf": "10"}
    stream = out.add_stream("libx264", rate=10, options=options)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    for i in range(20):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64), 30 + 10 * i, np.uint8), format="gray")
        frame.pts = i
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))

with av.open("whole.mp4") as given, av.open("cut.mp4", "w") as out:
    source = given.streams.video[0]
    stream = out.add_stream_from_template(source)
    shift = int(CUT / source.time_base)
    for packet in given.demux(source):
        if packet.dts is not None:
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = stream
            out.mux(packet)


def shown(keep=lambda packet: True, skip="DEFAULT"):
    """Times and levels of the pictures that come from the packets kept; and how many packets these were."""
    with av.open("cut.mp4") as given:
        stream = given.streams.video[0]
        stream.codec_context.skip_frame = skip
        packets = [packet for packet in given.demux(stream) if packet.dts is None or keep(packet)]
        frames = [frame for packet in packets for frame in packet.decode()]
        levels = [round(float(frame.to_ndarray(format="gray").mean())) for frame in frames]
        return [frame.time for frame in frames], levels, sum(packet.dts is not None for packet in packets)


with av.open("cut.mp4") as given:
    stream = given.streams.video[0]
    assert stream.frames == 20 and stream.start_time == 0
    packets = [packet for packet in given.demux(stream) if packet.dts is not None]
    discarded = [packet for packet in packets if packet.is_discard]
    keys = [(float(packet.pts * packet.time_base), packet.is_discard) for packet in packets if packet.is_keyframe]
print(f"packets       {len(packets)}, of them discarded {len(discarded)}, key frames at -0.5 (discarded) and 0.5")
assert len(packets) == 20 and len(discarded) == 5
assert keys == [(-0.5, True), (0.5, False)]

times, levels, _ = shown()
print(f"all decoded   {len(times)} pictures, from {times[0]} s")
assert len(times) == 15 and times[0] == 0.0
assert levels == sorted(set(levels))  # fifteen different pictures, in order

late, late_levels, kept = shown(keep=lambda packet: not packet.is_discard)
print(f"without flag  {kept} packets, {len(late)} pictures, from {late[0]} s")
assert kept == 15 and late == times[5:] and late_levels == levels[5:]

key_times, _, _ = shown(skip="NONKEY")
print(f"key frames    {len(key_times)} picture, from {key_times[0]} s")
assert key_times == [0.5]
PYTHON
