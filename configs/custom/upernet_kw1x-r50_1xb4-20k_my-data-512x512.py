# Your own segmentation data on one GPU: change what is between the lines, see
# docs/custom_segmentation.md.
_base_ = '../upernet/upernet_kw1x-r50_4xb4-80k_ade20k-512x512.py'

# ---------------------------------------------------------------------------------------------
data_root = 'data/my_data/'
metainfo = dict(classes=('background', 'circle', 'square', 'triangle', 'ring'))
train_files = dict(img_path='train/', seg_map_path='annotations/semantic_train/')
val_files = dict(img_path='val/', seg_map_path='annotations/semantic_val/')
suffixes = dict(img_suffix='.jpg', seg_map_suffix='.png')
# Whether 0 in the label maps is no class but what is to be ignored, as in ADE20K's. Then 1 is the
# first class.
reduce_zero_label = False
batch_size = 4
max_iters = 20000
# ---------------------------------------------------------------------------------------------

num_classes = len(metainfo['classes'])
model = dict(
    decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes))

# The base's are ADE20K's, which ignore 0; these do as the data set says.
train_pipeline = _base_.train_pipeline
train_pipeline[1] = dict(type='LoadAnnotations')
test_pipeline = _base_.test_pipeline
test_pipeline[2] = dict(type='LoadAnnotations')
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=metainfo,
    reduce_zero_label=reduce_zero_label,
    **suffixes)
train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(data_prefix=train_files, pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    dataset=dict(data_prefix=val_files, pipeline=test_pipeline, test_mode=True, **dataset))
test_dataloader = val_dataloader

# The recipe's rate is for 16 images a step; fewer images, a lower rate.
optim_wrapper = dict(optimizer=dict(lr=0.01 * batch_size / 16))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=0, end=max_iters, by_epoch=False)]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(
    checkpoint=dict(interval=max_iters // 10, max_keep_ckpts=3, save_best='mIoU'))
