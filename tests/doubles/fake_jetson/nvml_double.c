/* A double of NVIDIA's management library: one graphics card whose figures were made up.

   NVML_DOUBLE_STATE names a file of "key value" lines that is read at every call, so that a test can change what the
   card says while something watches it: power_mw, temperature_c, clock_mhz, memory_clock_mhz, max_clock_mhz,
   power_limit_mw, load_percent, memory_total_mib, memory_used_mib, reasons. A key that is missing is a figure that
   the card does not have. NVML_DOUBLE_UUID and NVML_DOUBLE_NAME say who it is. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
enum { CLOCK_SM = 1 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;

static int initialized;
static int card;

static int state(const char *wanted, double *value) {
    const char *path = getenv("NVML_DOUBLE_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char key[64];
    int found = 0;
    while (file && !found && fscanf(file, "%63s %lf", key, value) == 2) found = !strcmp(key, wanted);
    if (file) fclose(file);
    return found;
}

static int number(const char *key, unsigned *to) {
    double value;
    if (!initialized) return UNINITIALIZED;
    if (!state(key, &value)) return NOT_SUPPORTED;
    *to = (unsigned)value;
    return SUCCESS;
}

static int text(const char *variable, char *to, unsigned length) {
    const char *value = getenv(variable);
    if (!initialized) return UNINITIALIZED;
    if (!value) return NOT_SUPPORTED;
    snprintf(to, length, "%s", value);
    return SUCCESS;
}

int nvmlInit_v2(void) { initialized = 1; return SUCCESS; }
int nvmlShutdown(void) { initialized = 0; return SUCCESS; }

const char *nvmlErrorString(int status) {
    return status == SUCCESS ? "Success" : status == UNINITIALIZED ? "Uninitialized" :
        status == NOT_SUPPORTED ? "Not Supported" : "Invalid Argument";
}

int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return initialized ? SUCCESS : UNINITIALIZED; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index) return INVALID_ARGUMENT;
    *device = &card;
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) { return text("NVML_DOUBLE_NAME", name, length); }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { return text("NVML_DOUBLE_UUID", uuid, length); }

int nvmlDeviceGetPciInfo_v3(void *device, PciInfo *info) {
    memset(info, 0, sizeof *info);
    info->bus = 1;
    strcpy(info->bus_id_legacy, "0000:01:00.0");
    strcpy(info->bus_id, "00000000:01:00.0");
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { return number("power_mw", milliwatts); }

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    struct timespec now;
    unsigned milliwatts;
    int status = number("power_mw", &milliwatts);
    if (status) return status;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = (unsigned long long)(milliwatts * (now.tv_sec + now.tv_nsec / 1e9));
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) { return number("power_limit_mw", milliwatts); }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) { return number("temperature_c", degrees); }

int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *mhz) {
    return number(clock == CLOCK_SM ? "clock_mhz" : "memory_clock_mhz", mhz);
}

int nvmlDeviceGetMaxClockInfo(void *device, int clock, unsigned *mhz) { return number("max_clock_mhz", mhz); }

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    unsigned total_mib, used_mib;
    int status = number("memory_total_mib", &total_mib);
    if (!status) status = number("memory_used_mib", &used_mib);
    if (status) return status;
    memory->total = (unsigned long long)total_mib << 20;
    memory->used = (unsigned long long)used_mib << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
    int status = number("load_percent", &rates->gpu);
    rates->memory = status ? 0 : rates->gpu / 2;
    return status;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
    unsigned bits;
    int status = number("reasons", &bits);
    if (!status) *reasons = bits;
    return status;
}
