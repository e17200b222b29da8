"""How good generated images are: distances in a feature space, coverage, and a judge of their classes.

The modules:
    moments.py              streaming mean and covariance that merge
    frechet.py              Frechet distance of two moments
    kernel.py               unbiased kernel distance (KID)
    precision_recall.py     improved precision and recall, density and coverage
    sharpness.py            energy at high spatial frequencies
    extractor.py            what a feature network is, and the digest of its weights
    classifier.py           the default feature network, a small classifier
    classifier_training.py  its training
    features.py             which feature network a job uses
    subset.py               random subsets of equal size
    score.py                all scores of generated images, gathered by shards
"""
