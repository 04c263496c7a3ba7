# The paper's augmentation: flip, then either resize to a random short side, or resize, crop and
# resize again.
scales = [(short, 1333) for short in range(480, 801, 32)]
flip = dict(type='RandomFlip', prob=0.5)
resize_or_crop = dict(
    type='RandomChoice',
    transforms=[
        [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
        [
            dict(type='RandomChoiceResize', scales=[(400, 4200), (500, 4200), (600, 4200)],
                 keep_ratio=True),
            dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600),
                 allow_negative_crop=True),
            dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
        ],
    ])
