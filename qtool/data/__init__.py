"""Datasets, transforms, the calibration subset.

`open_dataset` gives images by number, `make_loader` gives them in batches:

    kinds.py            what DATA is: an image folder, CIFAR, MNIST, an .npz file, the built-in digits
    preprocessing.py    how an image becomes the tensor that a model expects
    datasets.py         open_dataset, and whether a dataset fits a model
    calibration_set.py  which images calibrate, and how many of them are also evaluated
    loader.py           batches, the same for any number of worker processes
    workers.py          the processes, which know nothing of images
"""
