// The two symbols of libsemkv_plugins.so: TensorRT's loadLibrary calls them. Nothing registers itself, so the library may
// also be embedded in an engine.
#include "../compact_cache/compact_cache_plugin.h"
#include "../nexus_attention/nexus_attention_plugin.h"
#include "../semantic_block_map/semantic_block_map_plugin.h"
#include "../semantic_block_select/semantic_block_select_plugin.h"
#include "../semantic_cluster/semantic_cluster_plugin.h"

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    semkv::setLoggerFinder(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static semkv::OperatorCreator<semkv::NexusAttentionPlugin> nexusAttention;
    static semkv::OperatorCreator<semkv::SemanticClusterPlugin> semanticCluster;
    static semkv::OperatorCreator<semkv::CompactCachePlugin> compactCache;
    static semkv::OperatorCreator<semkv::SemanticBlockMapPlugin> semanticBlockMap;
    static semkv::OperatorCreator<semkv::SemanticBlockSelectPlugin> semanticBlockSelect;
    static nvinfer1::IPluginCreatorInterface* const creators[]{
        &nexusAttention, &semanticCluster, &compactCache, &semanticBlockMap, &semanticBlockSelect};
    count = 5;
    return creators;
}
