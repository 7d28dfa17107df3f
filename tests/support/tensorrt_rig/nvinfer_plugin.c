/* libnvinfer_plugin without plugins. */

#include <stdbool.h>

bool initLibNvInferPlugins(void *logger, const char *plugin_namespace)
{
    (void)logger;
    (void)plugin_namespace;
    return true;
}
