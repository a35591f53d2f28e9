"""Class means stand in for a classifier."""

import pytest
import torch
import torch.nn.functional as F

from kdhooks import KDHooksError, Teacher, class_means
from kdhooks.testing import tiny_batch, tiny_teacher


@pytest.mark.parametrize("flip", [False, True])
def test_class_means_equal_the_plain_computation(flip: bool) -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch(copies=3)
    labels[4] = -1
    found = class_means(teacher, [(images[:7], labels[:7]), (images[7:], labels[7:])], 6, flip=flip)
    for label in range(6):
        total = torch.zeros(12)
        for image, own in zip(images, labels, strict=True):
            if own == label:
                views = [image, image.flip(-1)] if flip else [image]
                for view in views:
                    total += F.normalize(teacher(view[None]).embedding)[0]
        torch.testing.assert_close(found[label], F.normalize(total, dim=0))


def test_they_find_their_own_classes() -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch()
    rows = Teacher(teacher.module, classifier=class_means(teacher, [(images, labels)], 6))  # type: ignore[arg-type]
    assert rows.classifier is not None
    assert torch.equal(rows.classifier.nearest(teacher(images).embedding), labels)


def test_every_class_needs_an_image_and_every_label_a_class() -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch()
    with pytest.raises(KDHooksError, match=r"1 of 7 have none \(the first: \[6\]\)"):
        class_means(teacher, [(images, labels)], 7)
    with pytest.raises(KDHooksError, match="labels run from 0 to 4; found 5"):
        class_means(teacher, [(images, labels)], 5)
    with pytest.raises(KDHooksError, match="6 of 6 have none"):
        class_means(teacher, [], 6)
