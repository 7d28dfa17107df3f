/* C interface of the kernels. Functions take device pointers and a stream, and return an error code.

   libmaskrcnn_kernels.so exports these functions, libmaskrcnn_plugins.so calls them from TensorRT's enqueue, and the
   tests build the same sources for the CPU, where pointers are host memory and the stream is ignored.
   No function allocates memory, synchronises or keeps a pointer, so all can be captured in a CUDA graph.
   Each returns 0, a CUDA error code, or MASKRCNN_INVALID for invalid arguments; then nothing was launched. */

#ifndef MASKRCNN_KERNELS_H
#define MASKRCNN_KERNELS_H

#if !defined(__CUDACC_RTC__) /* NVRTC has no standard headers; it uses only the types below */
#include <stddef.h>
#include <stdint.h>
#endif

#if defined(_WIN32)
#define MASKRCNN_EXPORT __declspec(dllexport)
#else
#define MASKRCNN_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MASKRCNN_KERNELS_VERSION 2 /* incremented when a signature or struct below changes */
#define MASKRCNN_INVALID (-1)
#define MASKRCNN_MAX_LEVELS 16

typedef enum { MASKRCNN_FLOAT32 = 0, MASKRCNN_FLOAT16 = 1, MASKRCNN_BFLOAT16 = 2 } maskrcnn_dtype;

/* Memory layout of a feature map: [N, C, H, W], or [N, H, W, P] with P = channel_pitch >= C. */
typedef enum { MASKRCNN_NCHW = 0, MASKRCNN_NHWC = 1 } maskrcnn_layout;

/* MultilevelRoiAlign of plugins/contract.py. Level l has a stride of 2^(min_level + l) pixels. */
typedef struct {
    const void *features[MASKRCNN_MAX_LEVELS]; /* of dtype, in layout */
    int32_t heights[MASKRCNN_MAX_LEVELS];
    int32_t widths[MASKRCNN_MAX_LEVELS];
    int32_t num_levels;    /* 1 .. MASKRCNN_MAX_LEVELS */
    int32_t batch;         /* N >= 0 */
    int32_t num_rois;      /* R >= 0, per image */
    int32_t channels;      /* C >= 0 */
    int32_t channel_pitch; /* P, elements from one pixel to the next; used for MASKRCNN_NHWC only, P * width < 2^29 */
    int32_t dtype;         /* maskrcnn_dtype of the features */
    int32_t layout;        /* maskrcnn_layout of the features */
    int32_t output_dtype;  /* dtype, or MASKRCNN_FLOAT32 */
    int32_t output_size;   /* S >= 1 */
    int32_t sampling_ratio; /* 0: adaptive */
    int32_t aligned;        /* 0 or 1 */
    int32_t min_level;
    int32_t canonical_level;
    float canonical_size; /* px */
    float level_epsilon;
} maskrcnn_roi_align_params;

#if !defined(__CUDACC_RTC__)

/* rois: float32 [N, R, 4] xyxy px of the network's input; a RoI with NaN or infinite length gives zeros.
   pooled: output_dtype [N, R, C, S, S]. */
MASKRCNN_EXPORT int maskrcnn_multilevel_roi_align(const maskrcnn_roi_align_params *params, const float *rois,
                                                  void *pooled, void *stream);

/* Gradient of MultilevelRoiAlign. Adds the gradient of the features to `features` of the parameters, in no fixed order:
   float32 [N, H, W, P], with dtype and layout set accordingly, written although declared const. pooled: gradient of the
   result, of any output_dtype. The RoIs have no gradient. */
MASKRCNN_EXPORT int maskrcnn_multilevel_roi_align_gradient(const maskrcnn_roi_align_params *params, const float *rois,
                                                           const void *pooled, void *stream);

/* BatchedNms of plugins/contract.py: boxes float32 [N, K, 4] by descending score, groups int32 [N, K], counts int32
   [N]; indices int32 [N, M], num int32 [N]. workspace: maskrcnn_batched_nms_workspace(N, K) bytes of device memory,
   aligned to 4, with arbitrary contents. */
MASKRCNN_EXPORT int maskrcnn_batched_nms(const float *boxes, const int32_t *groups, const int32_t *counts,
                                         int32_t batch, int32_t num_boxes, float iou_threshold, int32_t max_output,
                                         void *workspace, int32_t *indices, int32_t *num, void *stream);
MASKRCNN_EXPORT size_t maskrcnn_batched_nms_workspace(int32_t batch, int32_t num_boxes);

/* Pastes masks [D, S, S] (dtype float32 or float16, probabilities in the frame of their box) into an image of
   height x width pixels, at boxes float32 [D, 4] xyxy px of the image. Writes one bit per pixel, set if the
   probability is greater than the threshold.
   bits: by_columns 0: uint32 [D, height, ceil(width / 32)], bit b of word w is column 32 w + b;
         by_columns 1: uint32 [D, width, ceil(height / 32)], bit b of word w is row 32 w + b, the order of COCO's
         run lengths. Bits past the end are 0. */
MASKRCNN_EXPORT int maskrcnn_paste_masks(const void *masks, const float *boxes, int32_t num_masks, int32_t mask_size,
                                         int32_t dtype, int32_t height, int32_t width, float threshold,
                                         int32_t by_columns, uint32_t *bits, void *stream);

/* Computes the detector's input from an image: resizes uint8 [height, width, 3] to resized_height x resized_width by
   linear interpolation with half-integer pixel centres and no antialiasing, and writes it to the upper left of float32
   [3, padded_height, padded_width], padded with zeros. Values stay 0 to 255. swap_channels 1: converts RGB to BGR. */
MASKRCNN_EXPORT int maskrcnn_resize_pad(const uint8_t *image, int32_t height, int32_t width, float *padded,
                                        int32_t resized_height, int32_t resized_width, int32_t padded_height,
                                        int32_t padded_width, int32_t swap_channels, void *stream);

/* Message for a code that a function above returned; never null. */
MASKRCNN_EXPORT const char *maskrcnn_error_string(int code);
MASKRCNN_EXPORT int maskrcnn_kernels_version(void);

#endif

#ifdef __cplusplus
}
#endif
#endif
