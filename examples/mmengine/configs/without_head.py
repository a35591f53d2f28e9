# The weight of the head's own loss is 0. It is the base of methods whose term replaces that loss.
_base_ = 'labels_alone.py'
model = dict(head=dict(loss_weight=0.0))
