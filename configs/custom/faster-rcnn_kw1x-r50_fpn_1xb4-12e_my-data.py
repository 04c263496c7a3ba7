# Your own data set with boxes and no masks, on one GPU: change what is between the
# lines, see docs/custom_dataset.md.
_base_ = '../faster_rcnn/faster-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'

# ---------------------------------------------------------------------------------------------
data_root = 'data/my_data/'
metainfo = dict(classes=('circle', 'square', 'triangle', 'ring'))
train_files = dict(ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'))
val_files = dict(ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'))
batch_size = 4
# ---------------------------------------------------------------------------------------------

num_classes = len(metainfo['classes'])
model = dict(roi_head=dict(bbox_head=dict(num_classes=num_classes)))

train_dataloader = dict(
    batch_size=batch_size, dataset=dict(data_root=data_root, metainfo=metainfo, **train_files))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, **val_files))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_files['ann_file'])
test_evaluator = val_evaluator

# The recipe's rate is for 16 images a step; fewer images, a lower rate.
optim_wrapper = dict(optimizer=dict(lr=1e-4 * batch_size / 16))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
