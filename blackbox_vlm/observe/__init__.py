"""Observe once, then optimise for nothing (ours; see each module for the methods it rebuilds).

An endpoint that scores an image against texts, or returns its vector, is asked about every training
image once. What it answered is an `Observation`: numbers per image, and how its own zero-shot
prediction is read from them. Everything after that is local and free:

    observation.py  answers (n, K), and the readout (K, C) that makes zero-shot logits of them
    bank.py         which texts to ask about, beside the class names
    features.py     answers -> features: centring, principal components, partial whitening
    heads.py        what a head is: features and zero-shot logits -> logits
    gaussian.py, prototypes.py, linear.py, kernel.py, refiner.py, trust.py
                    the heads; the last is the zero-shot classifier, weighed
    candidates.py   which of them compete, with which settings
    choose.py       out-of-fold predictions, the choice among them, their combination
    pooling.py, ensemble.py
                    weights of a combination, and the combination itself
    calibration.py  temperature, expected calibration error with an interval
    questions.py, ballots.py, votes.py, naive_bayes.py
                    the same for endpoints that only name a label
    tensors.py      a combination as arrays, for whoever stores it
"""
