"""Decoding, geometry, cursor and encoding."""

import pytest
import torch
from helpers_data import DATA, LUANTI, make_video

from vjepa_ac_hf.processing_vjepa2_ac import resize_frames
from vjepa_ac_hf.recordings.video import VideoError, VideoReader, draw_cursor, encode_clip


def noise(num_frames=2, height=36, width=64):
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8)


def test_frames_are_exact_whatever_the_order_of_calls(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(make_video(60))
    reader, other = VideoReader(str(file), "a"), VideoReader(make_video(60), "a")
    assert (reader.num_frames, reader.frame_rate) == (60, 20)
    everything = other.frames(list(range(60)))
    for indices in ([0, 4, 8], [8, 12, 59], [3, 4], [59, 0]):
        torch.testing.assert_close(reader.frames(indices), everything[indices], rtol=0, atol=0)
    # Neighbouring frames differ by 3 shades: an off-by-one would show.
    assert (everything[10].float() - everything[11].float()).abs().mean() > 1.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"rec\.mp4: empty video file: expected an mp4 video, found 0 bytes"),
        (b"not a video", r"rec\.mp4: cannot open the video: "),
        (make_video(40)[:-900], r"rec\.mp4: cannot open the video: "),
    ],
)
def test_unusable_videos(data, message, tmp_path):
    with pytest.raises(VideoError, match=message):
        VideoReader(data, "rec.mp4")
    (tmp_path / "rec.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=message):
        VideoReader(tmp_path / "rec.mp4", "rec.mp4")


def test_frame_beyond_the_end():
    with pytest.raises(VideoError, match=r"rec: cannot decode: frames 5 to 99 of 40: "):
        VideoReader(make_video(40), "rec").frames([5, 99])


@pytest.mark.parametrize(("height", "width"), [(360, 640), (64, 36), (50, 50), (101, 77)])
def test_crop_is_antialiased_resize_then_centre_crop(height, width):
    frames = noise(1, height, width)
    result = resize_frames(frames, 32)
    size = (32, int(32 * width / height)) if height <= width else (int(32 * height / width), 32)
    whole = torch.nn.functional.interpolate(frames.double(), size=size, mode="bilinear", antialias=True)
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    assert result.shape == (1, 3, 32, 32) and result.dtype == torch.uint8
    expected = whole[..., top : top + 32, left : left + 32]
    assert (result.double() - expected).abs().max() <= 1.01


def test_crop_keeps_top_and_bottom_and_squash_keeps_all():
    frames = torch.zeros(1, 3, 36, 64, dtype=torch.uint8)
    frames[..., -2:, :] = 255
    frames[..., :, :2] = 200
    cropped, squashed = resize_frames(frames, 32), resize_frames(frames, 32, "squash")
    assert cropped[..., -1, 16].min() > 200 and cropped[..., :16, 0].max() == 0
    assert squashed[..., 0, 0].min() > 150 and squashed[..., -1, 16].min() > 200


def test_frames_of_the_right_size_are_untouched():
    frames = noise(2, 32, 32)
    assert torch.equal(resize_frames(frames, 32), frames)


def test_resize_refuses_wrong_input():
    with pytest.raises(ValueError, match="expected uint8 frames"):
        resize_frames(noise().float(), 32)
    with pytest.raises(ValueError, match="resize_mode must be one of .*found 'pad'"):
        resize_frames(noise(), 32, "pad")


def test_encoded_clip_has_its_frames_and_quality():
    reader = VideoReader(DATA / f"{LUANTI}.mp4", LUANTI)
    frames = resize_frames(reader.frames(list(range(0, 64, 4))), 256)
    data = encode_clip(frames, 5)
    assert data == encode_clip(frames, 5), "the same frames give the same bytes"
    clip = VideoReader(data, "clip")
    assert (clip.num_frames, clip.frame_rate) == (16, 5)
    decoded = clip.frames(range(16))
    error = (decoded.double() - frames.double()).square().mean(dim=(1, 2, 3))
    psnr = 10 * torch.log10(255**2 / error)
    assert psnr.mean() > 38 and psnr.min() > 35


def test_cursor_is_painted_at_its_place():
    frame = torch.full((3, 360, 640), 128, dtype=torch.uint8)
    draw_cursor(frame, 400, 200)
    changed = (frame != 128).any(dim=0).nonzero()
    assert changed.min(dim=0).values.tolist() == [100, 200]
    assert changed.max(dim=0).values.tolist() <= [114, 214] and len(changed) > 40
    assert frame.unique().tolist() == [0, 128, 255]


@pytest.mark.parametrize(("x", "y", "is_painted"), [(1279, 719, True), (1280, 0, False), (-5, 3, False)])
def test_cursor_at_the_border(x, y, is_painted):
    frame = torch.full((3, 36, 64), 128, dtype=torch.uint8)
    draw_cursor(frame, x, y)
    assert bool((frame != 128).any()) == is_painted
