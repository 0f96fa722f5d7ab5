"""How clips could be stored, and how frames could be scaled: size, PSNR and processor time, side by side.

    python benchmarks/clip_storage.py --videos recordings/*.mp4 --output clip_storage.json

Clips are cut as the builder does it, 16 frames at 5 FPS, from evenly spaced places of every video. Times are of the
processor, one thread, medians over clips; every candidate sees the same clips. PSNR is against the frames encoded.
The second table compares resizing after decoding (what the builder does) with FFmpeg's scaling while decoding.
"""

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import VideoEncoder
from torchcodec.transforms import CenterCrop, Resize
from tqdm import tqdm

from vjepa_ac_hf.processing_vjepa2_ac import resize_frames
from vjepa_ac_hf.recordings import video
from vjepa_ac_hf.records import versions, write_json

RESOLUTION, FRAMES, STRIDE = 256, 16, 4
Codec = tuple[Callable[[torch.Tensor], list[bytes]], Callable[[list[bytes]], torch.Tensor]]


def h264(preset: str, crf: int, params: str = "mbtree=0", pixel_format: str = "yuv420p", **options: str) -> Codec:
    def encode(clip: torch.Tensor) -> list[bytes]:
        encoded = VideoEncoder(clip, frame_rate=5).to_tensor(
            "mp4",
            codec="libx264",
            pixel_format=pixel_format,
            crf=crf,
            preset=preset,
            extra_options={"threads": "1", "x264-params": params, **options},
        )
        return [encoded.numpy().tobytes()]

    return encode, lambda data: VideoDecoder(data[0], num_ffmpeg_threads=1)[:]


def images(kind: str, **options) -> Codec:
    def encode(clip: torch.Tensor) -> list[bytes]:
        files = [io.BytesIO() for _ in clip]
        for frame, file in zip(clip.permute(0, 2, 3, 1).numpy(), files, strict=True):
            Image.fromarray(frame).save(file, kind, **options)
        return [file.getvalue() for file in files]

    def decode(data: list[bytes]) -> torch.Tensor:
        frames = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in data])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    return encode, decode


CANDIDATES: dict[str, Codec] = {
    "in use": (lambda clip: [video.encode_clip(clip, 5)], lambda data: VideoDecoder(data[0], num_ffmpeg_threads=1)[:]),
    "veryfast, crf 18": h264("veryfast", 18),
    "veryfast, crf 18, 4:4:4": h264("veryfast", 18, pixel_format="yuv444p"),
    "veryfast, crf 18, every frame intra": h264("veryfast", 18, "mbtree=0:keyint=1"),
    "medium, crf 18": h264("medium", 18),
    "veryfast, crf 18, fastdecode": h264("veryfast", 18, tune="fastdecode"),
    "veryfast, crf 18, fastdecode, no AQ": h264("veryfast", 18, "mbtree=0:aq-mode=0", tune="fastdecode"),
    "superfast, crf 18, fastdecode, no AQ": h264("superfast", 18, "mbtree=0:aq-mode=0", tune="fastdecode"),
    "superfast, crf 20, fastdecode": h264("superfast", 20, tune="fastdecode"),
    "ultrafast, crf 20": h264("ultrafast", 20),
    "JPEG 90": images("JPEG", quality=90),
    "JPEG 95, 4:4:4": images("JPEG", quality=95, subsampling=0),
    "WebP 90": images("WEBP", quality=90),
    "PNG": images("PNG"),
}


def psnr(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """dB of every frame; equal frames count as 100 dB."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / error.clamp(min=255**2 / 1e10))).tolist()


def timed(call: Callable, *arguments):
    start = time.process_time()
    result = call(*arguments)
    return result, 1000 * (time.process_time() - start)


def cut_clips(videos: list[Path], clips_per_video: int) -> list[torch.Tensor]:
    clips = []
    for path in videos:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1)
        last = len(decoder) - STRIDE * FRAMES
        if last < 0:
            raise ValueError(f"{path}: a clip needs {STRIDE * FRAMES} frames, found {len(decoder)}")
        for start in np.linspace(0, last, clips_per_video).astype(int):
            frames = decoder.get_frames_at([int(start) + STRIDE * i for i in range(FRAMES)]).data
            clips.append(resize_frames(frames, RESOLUTION))
    return clips


def measure_storage(clips: list[torch.Tensor]) -> list[dict]:
    results = {name: {"kilobytes": [], "psnr": [], "encode_ms": [], "decode_ms": []} for name in CANDIDATES}
    for clip in tqdm(clips, desc="clips"):
        for name, (encode, decode) in CANDIDATES.items():  # interleaved: a busy moment meets all of them
            data, encode_ms = timed(encode, clip)
            decoded, decode_ms = timed(decode, data)
            found = results[name]
            found["kilobytes"].append(sum(map(len, data)) / 1000)
            found["psnr"] += psnr(decoded, clip)
            found["encode_ms"].append(encode_ms)
            found["decode_ms"].append(decode_ms)
    return [
        {
            "candidate": name,
            "kilobytes": statistics.mean(found["kilobytes"]),
            "psnr_mean": statistics.mean(found["psnr"]),
            "psnr_lowest": min(found["psnr"]),
            "encode_ms": statistics.median(found["encode_ms"]),
            "decode_ms": statistics.median(found["decode_ms"]),
        }
        for name, found in results.items()
    ]


def measure_scaling(path: Path, num_clips: int) -> dict:
    """Decoding and scaling the first clips of a video: after decoding against while decoding."""
    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    height, width = decoder.metadata.height, decoder.metadata.width
    short = min(height, width)
    size = (int(RESOLUTION * height / short), int(RESOLUTION * width / short))
    scaling = VideoDecoder(path, num_ffmpeg_threads=1, transforms=[Resize(size), CenterCrop((RESOLUTION, RESOLUTION))])
    after, during, quality = [], [], []
    for clip in range(min(num_clips, len(decoder) // (STRIDE * FRAMES))):
        ticks = [clip * STRIDE * FRAMES + STRIDE * i for i in range(FRAMES)]
        expected, after_ms = timed(lambda: resize_frames(decoder.get_frames_at(ticks).data, RESOLUTION))  # noqa: B023
        found, during_ms = timed(lambda: scaling.get_frames_at(ticks).data)  # noqa: B023
        after.append(after_ms)
        during.append(during_ms)
        quality += psnr(found, expected)
    return {
        "video": path.name,
        "size": [width, height],
        "resize_after_decoding_ms": statistics.median(after),
        "scale_while_decoding_ms": statistics.median(during),
        "psnr_mean": statistics.mean(quality),
        "psnr_lowest": min(quality),
    }


def print_table(rows: list[dict]) -> None:
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", type=Path, required=True, help="recordings (.mp4)")
    parser.add_argument("--clips_per_video", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    storage = measure_storage(cut_clips(arguments.videos, arguments.clips_per_video))
    scaling = [measure_scaling(path, 8) for path in arguments.videos]
    print_table(storage)
    print()
    print_table(scaling)
    if arguments.output:
        machine = {"processor": platform.processor() or platform.machine(), "versions": versions()}
        write_json(arguments.output, {"storage": storage, "scaling": scaling, **machine})


if __name__ == "__main__":
    main()
