"""Observe once, then optimise for nothing (ours; see each module for the methods it rebuilds).

An endpoint that scores an image against texts, or returns its vector, is asked about every training
image once. What it answered is an `Observation`: numbers per image, and how its own zero-shot
prediction is read from them. Everything after that is local and free:

    observation.py  answers (n, K), and the readout (K, C) that makes zero-shot logits of them
    bank.py         which texts to ask about, beside the class names
    features.py     answers -> features: centring, principal components, partial whitening
    gaussian.py, prototypes.py, linear.py, kernel.py, refiner.py
                    the heads: features and zero-shot logits -> logits
    choose.py       out-of-fold predictions, the choice among heads, their combination
    calibration.py  temperature, expected calibration error with an interval
    votes.py        the same for endpoints that only name a label
"""
