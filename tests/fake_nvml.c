/* A libnvidia-ml.so.1 without a GPU: it simulates the GPUs that a text file describes.
 *
 * The tests reach it through pynvml's real ctypes path, so the struct layouts, the names of the
 * functions and the two-call protocol for lists are those of NVIDIA's nvml.h. The file named by
 * FAKE_NVML_STATE is read again at every call: a test changes it and the GPU changes under a running
 * process. Each line has one fact; lines after a `device` line belong to that device:
 *
 *     driver VERSION                what nvmlSystemGetDriverVersion says
 *     init_error CODE               nvmlInit fails with this nvmlReturn_t
 *     memory_info_version 1         an old driver: there is no nvmlDeviceGetMemoryInfo_v2
 *     device UUID NAME              begins the next GPU; without such a line there is none
 *     total BYTES
 *     reserved BYTES                held by the driver: version 1 counts it as used, version 2 does not
 *     used BYTES
 *     process PID BYTES|none        none: the driver reports NVML_VALUE_NOT_AVAILABLE
 *     processes_auto BYTES          every live process started as `workers.…` uses that much
 *     process_error CODE            listing processes fails; 13 is how an old driver looks to pynvml
 *     memory_error CODE             reading the memory fails
 *     slow_us N                     reading the memory takes at least that long
 *     mig 1                         the device is in MIG mode, even without slices
 *     slice UUID                    begins a MIG slice of the last device; the lines after it are the slice's
 *     lost 1                        every call on the device fails with NVML_ERROR_GPU_IS_LOST
 *
 * State of the device; a figure without a line is NVML_ERROR_NOT_SUPPORTED:
 *
 *     sm_clock MHZ
 *     memory_clock MHZ
 *     temperature CELSIUS
 *     power_mw MILLIWATTS
 *     clock_reasons BITS            decimal, nvmlClocksEventReason…: 1 idle, 4 power cap, 32 heat
 *     throttle_reasons BITS         the same from a driver that only has the call's older name
 *     violation_power_ns NS         time limited by power
 *     violation_thermal_ns NS
 *     state_error CODE              all calls for these figures fail, but others succeed
 */

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_DEVICES = 16, MAX_SLICES = 7, MAX_PROCESSES = 64 };

enum {
    SUCCESS = 0,
    ERROR_INVALID_ARGUMENT = 2,
    ERROR_NOT_SUPPORTED = 3,
    ERROR_NOT_FOUND = 6,
    ERROR_INSUFFICIENT_SIZE = 7,
    ERROR_FUNCTION_NOT_FOUND = 13,
    ERROR_GPU_IS_LOST = 15,
    ERROR_ARGUMENT_VERSION_MISMATCH = 25,
};

static const unsigned MEMORY_V2 = 0x02000028;
static const unsigned long long NOT_AVAILABLE = ~0ULL;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} Process;

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} Memory_v2;

typedef struct {
    unsigned long long reference_time, violation_time;
} ViolationTime;

enum { CLOCK_SM = 1, CLOCK_MEMORY = 2 };
enum { POLICY_POWER = 0, POLICY_THERMAL = 1 };

/* NOT_AVAILABLE if the state file has no line for it. */
typedef struct {
    unsigned long long sm_clock, memory_clock, temperature, power_mw, clock_reasons, throttle_reasons;
    unsigned long long violation_power_ns, violation_thermal_ns;
} Running;

typedef struct {
    char uuid[80], name[80];
    unsigned long long total, reserved, used, processes_auto;
    Process processes[MAX_PROCESSES];
    unsigned process_count;
    Running running;
    int process_error, state_error, memory_error, slow_us, mig, lost;
    size_t whole; /* handle of the device that this is a slice of, or 0 */
} Device;

typedef struct {
    char driver[80];
    int init_error, memory_info_version;
    Device devices[MAX_DEVICES];
    unsigned device_count;
} State;

/* A handle is the device's number plus one, so that no handle is NULL. */
typedef size_t Handle;

static void read_process(Device *device, const char *rest) {
    char bytes[32];
    if (device->process_count == MAX_PROCESSES)
        return;
    Process *process = &device->processes[device->process_count];
    if (sscanf(rest, "%u %31s", &process->pid, bytes) == 2) {
        process->used = strcmp(bytes, "none") ? strtoull(bytes, NULL, 10) : NOT_AVAILABLE;
        device->process_count++;
    }
}

static void read_running(Running *running, const char *key, unsigned long long number) {
    if (!strcmp(key, "sm_clock")) running->sm_clock = number;
    if (!strcmp(key, "memory_clock")) running->memory_clock = number;
    if (!strcmp(key, "temperature")) running->temperature = number;
    if (!strcmp(key, "power_mw")) running->power_mw = number;
    if (!strcmp(key, "clock_reasons")) running->clock_reasons = number;
    if (!strcmp(key, "throttle_reasons")) running->throttle_reasons = number;
    if (!strcmp(key, "violation_power_ns")) running->violation_power_ns = number;
    if (!strcmp(key, "violation_thermal_ns")) running->violation_thermal_ns = number;
}

static void read_device_line(Device *device, const char *key, const char *rest) {
    unsigned long long number = strtoull(rest, NULL, 10);
    if (!strcmp(key, "total")) device->total = number;
    if (!strcmp(key, "reserved")) device->reserved = number;
    if (!strcmp(key, "used")) device->used = number;
    if (!strcmp(key, "processes_auto")) device->processes_auto = number;
    if (!strcmp(key, "process_error")) device->process_error = (int)number;
    if (!strcmp(key, "state_error")) device->state_error = (int)number;
    if (!strcmp(key, "memory_error")) device->memory_error = (int)number;
    if (!strcmp(key, "slow_us")) device->slow_us = (int)number;
    if (!strcmp(key, "mig")) device->mig = (int)number;
    if (!strcmp(key, "lost")) device->lost = (int)number;
    if (!strcmp(key, "process")) read_process(device, rest);
    read_running(&device->running, key, number);
}

/* Slices are in the array of devices too, but are only reached by handle. */
static void begin_device(State *state, const char *rest, int is_slice) {
    size_t whole = state->device_count;
    while (whole > 0 && state->devices[whole - 1].whole)
        whole--;
    Device *device = &state->devices[state->device_count++];
    sscanf(rest, "%79s %79[^\n]", device->uuid, device->name);
    memset(&device->running, 0xff, sizeof device->running);
    if (is_slice) {
        device->whole = whole;
        state->devices[whole - 1].mig = 1;
    }
}

static void read_line(State *state, const char *key, const char *rest) {
    if (!strcmp(key, "driver")) sscanf(rest, "%79s", state->driver);
    if (!strcmp(key, "init_error")) state->init_error = atoi(rest);
    if (!strcmp(key, "memory_info_version")) state->memory_info_version = atoi(rest);
    int is_slice = !strcmp(key, "slice") && state->device_count > 0;
    if ((is_slice || !strcmp(key, "device")) && state->device_count < MAX_DEVICES) {
        begin_device(state, rest, is_slice);
    } else if (state->device_count > 0) {
        read_device_line(&state->devices[state->device_count - 1], key, rest);
    }
}

static void read_state(State *state) {
    memset(state, 0, sizeof *state);
    state->memory_info_version = 2;
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return;
    char line[256], key[32];
    int key_length;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%31s%n", key, &key_length) == 1)
            read_line(state, key, line + key_length);
    fclose(file);
}

/* Read the state and find the handle's device; returns an nvmlReturn_t. */
static int open_device(State *state, Handle handle, Device **device) {
    read_state(state);
    if (handle == 0 || handle > state->device_count)
        return ERROR_INVALID_ARGUMENT;
    *device = &state->devices[handle - 1];
    return (*device)->lost ? ERROR_GPU_IS_LOST : SUCCESS;
}

static int copy_text(char *to, unsigned size, const char *text) {
    if (strlen(text) >= size)
        return ERROR_INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    State state;
    read_state(&state);
    return state.init_error;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code ? "an error of the fake library" : "Success"; }

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    State state;
    read_state(&state);
    return copy_text(version, size, state.driver);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    State state;
    read_state(&state);
    *count = 0;
    for (unsigned place = 0; place < state.device_count; place++)
        *count += !state.devices[place].whole;
    return SUCCESS;
}

/* The nth of the slices of `whole`, or of the whole devices if `whole` is 0. */
static int nth_handle(const State *state, Handle whole, unsigned nth, Handle *handle) {
    for (unsigned place = 0; place < state->device_count; place++)
        if (state->devices[place].whole == whole && nth-- == 0) {
            *handle = (Handle)place + 1;
            return SUCCESS;
        }
    return whole ? ERROR_NOT_FOUND : ERROR_INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *handle) {
    State state;
    Device *device;
    read_state(&state);
    int code = nth_handle(&state, 0, index, handle);
    return code ? code : open_device(&state, *handle, &device);
}

int nvmlDeviceGetMigMode(Handle handle, unsigned *current, unsigned *pending) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    if (code)
        return code;
    *current = *pending = 1;
    return device->mig ? SUCCESS : ERROR_NOT_SUPPORTED; /* as on a GPU without MIG */
}

int nvmlDeviceGetMaxMigDeviceCount(Handle handle, unsigned *count) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    if (code == SUCCESS)
        *count = device->mig ? MAX_SLICES : 0;
    return code;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Handle handle, unsigned index, Handle *slice) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    return code ? code : nth_handle(&state, handle, index, slice);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle slice, Handle *handle) {
    State state;
    Device *device;
    int code = open_device(&state, slice, &device);
    if (code)
        return code;
    *handle = device->whole;
    return device->whole ? SUCCESS : ERROR_INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *handle) {
    State state;
    Device *device;
    read_state(&state);
    for (unsigned index = 0; index < state.device_count; index++)
        if (!strcmp(state.devices[index].uuid, uuid)) {
            *handle = (Handle)index + 1;
            return open_device(&state, *handle, &device);
        }
    return ERROR_NOT_FOUND;
}

int nvmlDeviceGetIndex(Handle handle, unsigned *index) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    *index = 0;
    for (size_t place = 0; code == SUCCESS && place + 1 < handle; place++)
        *index += !state.devices[place].whole;
    return code;
}

int nvmlDeviceGetName(Handle handle, char *name, unsigned size) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    return code ? code : copy_text(name, size, device->name);
}

int nvmlDeviceGetUUID(Handle handle, char *uuid, unsigned size) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    return code ? code : copy_text(uuid, size, device->uuid);
}

int nvmlDeviceGetCudaComputeCapability(Handle handle, int *major, int *minor) {
    State state;
    Device *device;
    *major = 9;
    *minor = 0;
    return open_device(&state, handle, &device);
}

/* Like open_device, for the calls that read memory. */
static int open_memory(State *state, Handle handle, Device **device) {
    int code = open_device(state, handle, device);
    if (code)
        return code;
    usleep((*device)->slow_us);
    return (*device)->memory_error;
}

int nvmlDeviceGetMemoryInfo(Handle handle, Memory *memory) {
    State state;
    Device *device;
    int code = open_memory(&state, handle, &device);
    if (code)
        return code;
    memory->total = device->total;
    memory->used = device->used + device->reserved;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Handle handle, Memory_v2 *memory) {
    State state;
    Device *device;
    int code = open_memory(&state, handle, &device);
    if (code)
        return code;
    if (state.memory_info_version < 2)
        return ERROR_FUNCTION_NOT_FOUND;
    if (memory->version != MEMORY_V2)
        return ERROR_ARGUMENT_VERSION_MISMATCH;
    memory->total = device->total;
    memory->reserved = device->reserved;
    memory->used = device->used;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

/* /proc/PID/cmdline has a NUL after each argument; a zombie has no arguments. */
static int is_worker(unsigned pid) {
    char path[32], text[4096];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    for (char *word = text; word < text + length; word += strlen(word) + 1)
        if (!strncmp(word, "workers.", strlen("workers.")))
            return 1;
    return 0;
}

static void add_workers(Device *device) {
    DIR *folder = opendir("/proc");
    if (!folder)
        return;
    for (struct dirent *entry; (entry = readdir(folder)) && device->process_count < MAX_PROCESSES;) {
        unsigned pid = isdigit((unsigned char)entry->d_name[0]) ? (unsigned)atoi(entry->d_name) : 0;
        if (pid && is_worker(pid)) {
            Process worker = {.pid = pid, .used = device->processes_auto};
            device->processes[device->process_count++] = worker;
        }
    }
    closedir(folder);
}

/* NVML's protocol for lists: if the array is too small, return the size it needs. */
int nvmlDeviceGetComputeRunningProcesses_v3(Handle handle, unsigned *count, Process *processes) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    if (code || device->process_error)
        return code ? code : device->process_error;
    if (device->processes_auto)
        add_workers(device);
    unsigned room = processes ? *count : 0;
    *count = device->process_count;
    if (room < *count)
        return ERROR_INSUFFICIENT_SIZE;
    if (processes)
        memcpy(processes, device->processes, *count * sizeof *processes);
    return SUCCESS;
}

/* Open a device to read its state; a figure of it may still be absent. */
static int open_running(Handle handle, Running *running) {
    State state;
    Device *device;
    int code = open_device(&state, handle, &device);
    if (code || device->state_error)
        return code ? code : device->state_error;
    *running = device->running;
    return SUCCESS;
}

static int give_unsigned(unsigned long long figure, unsigned *to) {
    if (figure == NOT_AVAILABLE)
        return ERROR_NOT_SUPPORTED;
    *to = (unsigned)figure;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Handle handle, unsigned type, unsigned *clock) {
    Running running;
    int code = open_running(handle, &running);
    if (code)
        return code;
    if (type != CLOCK_SM && type != CLOCK_MEMORY)
        return ERROR_INVALID_ARGUMENT;
    return give_unsigned(type == CLOCK_SM ? running.sm_clock : running.memory_clock, clock);
}

int nvmlDeviceGetTemperature(Handle handle, unsigned sensor, unsigned *temperature) {
    Running running;
    int code = open_running(handle, &running);
    if (code)
        return code;
    return sensor ? ERROR_INVALID_ARGUMENT : give_unsigned(running.temperature, temperature);
}

int nvmlDeviceGetPowerUsage(Handle handle, unsigned *power_mw) {
    Running running;
    int code = open_running(handle, &running);
    return code ? code : give_unsigned(running.power_mw, power_mw);
}

/* A real driver before 535 lacks this function; to pynvml both look the same. */
int nvmlDeviceGetCurrentClocksEventReasons(Handle handle, unsigned long long *reasons) {
    Running running;
    int code = open_running(handle, &running);
    if (code)
        return code;
    if (running.throttle_reasons != NOT_AVAILABLE)
        return ERROR_FUNCTION_NOT_FOUND;
    *reasons = running.clock_reasons;
    return *reasons == NOT_AVAILABLE ? ERROR_NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Handle handle, unsigned long long *reasons) {
    Running running;
    int code = open_running(handle, &running);
    if (code)
        return code;
    *reasons = running.throttle_reasons;
    return *reasons == NOT_AVAILABLE ? ERROR_NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetViolationStatus(Handle handle, unsigned policy, ViolationTime *violation) {
    Running running;
    int code = open_running(handle, &running);
    if (code)
        return code;
    if (policy != POLICY_POWER && policy != POLICY_THERMAL)
        return ERROR_INVALID_ARGUMENT;
    violation->reference_time = 1;
    violation->violation_time =
        policy == POLICY_POWER ? running.violation_power_ns : running.violation_thermal_ns;
    return violation->violation_time == NOT_AVAILABLE ? ERROR_NOT_SUPPORTED : SUCCESS;
}
