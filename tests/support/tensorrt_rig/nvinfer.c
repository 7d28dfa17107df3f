/* libnvinfer without a builder: registry, runtime and refitter are those of the lean library that it is linked to. */

#include <stddef.h>
#include <stdint.h>

extern void *getPluginRegistry(void);

void *createInferBuilder_INTERNAL(void *logger, int32_t version)
{
    (void)logger;
    (void)version;
    return NULL;
}

void *getBuilderPluginRegistry(int32_t engine_capability)
{
    (void)engine_capability;
    return getPluginRegistry();
}
