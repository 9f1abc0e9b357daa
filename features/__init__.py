"""Images in, one HDF5 store per (dataset, backbone) out."""
