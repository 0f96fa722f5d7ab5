"""Which clips a batch holds: a pure function, so that a run continues anywhere (docs/data.md, "Training input")."""

import numpy as np


class ClipOrder:
    """The clips of every batch of one process, for ever.

    Epoch e puts all N clips into a random order; the orders of all epochs are joined without a gap into one endless
    sequence of positions. Batch m of process r holds positions `(m * world_size + r) * batch_size` and on. So in every
    epoch each clip comes exactly once over all processes, every process has the same number of batches, and the batch
    at the end of an epoch takes its last clips from the next one: nothing is dropped or padded.

    Without a window an epoch's order is a uniform permutation and depends on the seed and N alone: batches of any two
    runs with the same product of batch size and processes hold the same clips.

    With a window, clips lie in groups (Parquet's row groups) that are costly to read and are read once. Groups are put
    in random order and dealt to the processes, each a contiguous share; a share's clips are then displaced by up to
    half a window to either side, at random. A process holds about `window` clips' worth of groups at any time. A
    group is shared by two processes only where a border falls into it.

    Args:
        group_sizes: clips of every group, in the order of clip numbers; one number: clips without groups.
        batch_size: clips of a batch of one process.
        seed: of all epochs.
        rank: this process.
        world_size: number of processes.
        window: clips among which a stream is mixed; None: a uniform permutation.

    Raises:
        ValueError: no clips, or values out of range.
    """

    def __init__(
        self,
        group_sizes: np.ndarray | int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window: int | None = None,
    ):
        self.group_sizes = np.atleast_1d(np.asarray(group_sizes, dtype=np.int64))
        self.num_clips = int(self.group_sizes.sum())
        if self.num_clips < 1:
            raise ValueError("the data set holds no clips")
        if batch_size < 1 or seed < 0 or not 0 <= rank < world_size or (window is not None and window < 1):
            raise ValueError(
                f"batch_size and window must be at least 1, seed at least 0, rank in [0, world_size); found batch_size "
                f"{batch_size}, window {window}, seed {seed}, rank {rank}, world_size {world_size}"
            )
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.rank, self.world_size = rank, world_size
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and clip numbers, both int64 `(batch_size,)`, of this process's batch `index`."""
        first = (index * self.world_size + self.rank) * self.batch_size
        epochs, offsets = np.divmod(np.arange(first, first + self.batch_size), self.num_clips)
        clips = [self.epoch(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)]
        return epochs, np.array(clips, dtype=np.int64)

    def rest_of_epoch(self, epoch: int, first_batch: int) -> np.ndarray:
        """Clip numbers of this process in an epoch, in order, from its batch `first_batch` on."""
        start = epoch * self.num_clips
        positions = np.arange(start, start + self.num_clips)
        batches, ranks = np.divmod(positions // self.batch_size, self.world_size)
        return self.epoch(epoch)[(ranks == self.rank) & (batches >= first_batch)]

    def epoch(self, epoch: int) -> np.ndarray:
        """All clip numbers in the order of an epoch, int64 `(num_clips,)`."""
        if epoch not in self._epochs:
            # Only what is read of a bit generator's doubles is promised to stay the same in numpy's next versions.
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            order = _permutation(random, self.num_clips) if self.window is None else self._windowed(random, epoch)
            self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def _windowed(self, random: np.random.Generator, epoch: int) -> np.ndarray:
        assert self.window is not None
        starts = np.cumsum(self.group_sizes) - self.group_sizes
        groups = _permutation(random, len(self.group_sizes))
        sizes = self.group_sizes[groups]
        ends = np.cumsum(sizes)
        place = np.arange(self.num_clips)  # in the sequence of shuffled groups
        clips = np.repeat(starts[groups] - (ends - sizes), sizes) + place

        # Positions of the epoch by the process that they fall to, and each process's share of the sequence.
        position = epoch * self.num_clips + place
        owner = (position // self.batch_size) % self.world_size
        share_end = np.cumsum(np.bincount(owner, minlength=self.world_size))
        share = np.searchsorted(share_end, place, side="right")
        share_size = np.diff(share_end, prepend=0)[share]
        share_start = share_end[share] - share_size

        # A group's part in a share moves about its centre; at the ends of the share it is reflected, which keeps the
        # mixing as good there as in the middle. Where the window is larger than the share, all of it is mixed.
        first = np.maximum(np.repeat(ends - sizes, sizes), share_start)
        last = np.minimum(np.repeat(ends, sizes), share_start + share_size)
        draw = random.random(self.num_clips)
        key = np.abs((first + last) / 2 - share_start + (draw - 0.5) * self.window)
        key = np.where(key > share_size, 2 * share_size - key, key)
        key = np.where(self.window >= share_size, draw, key)

        order = np.empty(self.num_clips, dtype=np.int64)
        order[np.argsort(owner, kind="stable")] = clips[np.lexsort((key, share))]
        return order


def _permutation(random: np.random.Generator, size: int) -> np.ndarray:
    return np.argsort(random.random(size), kind="stable")
