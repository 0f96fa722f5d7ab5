"""What a recording is: mp4 and log in, ticks, frames and the ticks of clips out (docs/data.md).

`names` says whose a recording is; `log` parses, checks and repairs the log, `mp4` and `video` the video, `timing` tells
which frame shows which tick; `shards` finds recordings in tars and folders; `clips` says which ticks a clip's frames,
actions and states come from; `splits` which recordings are for validation; `alignment` whether log and video are in
step. Open `log.py` first.
"""
