"""Small parts that several chapters share: errors, whole files, versions of weights, storage counts, optical flow."""
