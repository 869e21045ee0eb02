"""Teacher hidden states in zarr v3: written once, by any number of processes, and read by digest.

Layout of the artifact's folder:

- `states.zarr/hidden`: [K, P, S, W], the rows in the codec's form, one shard object per S rows;
- `states.zarr/target_ids`: int32 [K, S], the token that each row predicts;
- `states.zarr/fitted`: float32 [H], what a lossy codec has fixed once, where it has;
- `commits/<shard>.json`: written after a shard's data, with their sizes and checksums;
- `index.arrow`: per sequence its digest, first row, rows, XXH3-64 of the rows, and data source;
- `borrowed.arrow`: which shards are taken over from other artifacts, settled before the first is
  written.

A shard holds whole sequences, back to back, in the order of their digests, which is a random one.
Where each one goes follows from the row counts alone, which are known before the teacher runs:
whoever has the plan can write any shard, and a writer that died costs the shards it was at. Data
and commits are created, never replaced: of two writers of one shard the first wins, and the other
takes what it finds.

Dimensions: N rows of a sequence, H hidden size, K shards, S rows of a shard, C rows of a chunk,
P planes of a stored row, W values of a plane.
"""
