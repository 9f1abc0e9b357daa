"""Images in, one HDF5 store per (dataset, backbone) out.

To read, in this order: manifest and datasets/ (which images there are), images and workers (from
bytes to pixels), backbones/ (from pixels to features), fingerprint (what features depend on),
store with store_reader and store_writer, plan (what there is to do), chunks and jobs (batch by
batch), extract (all of it together).
"""
