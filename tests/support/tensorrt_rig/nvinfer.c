/* libnvinfer of a machine that cannot build engines: the registry, runtime and refitter are those of the lean
   library that this one is linked to, and there is no builder. */

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
