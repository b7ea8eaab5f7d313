/* boot(8) enters an amd64 kernel in 32-bit code of long mode, on 32-bit arguments, at its physical address. */

#define BASE 0xFFFFFFFF80000000 /* where the kernel is linked, less where it is loaded */
#define PHYSICAL(symbol) (symbol - BASE)

#define DATA 0x10
#define CODE64 0x18

    .section .text.start, "ax"
    .code32
    .globl start
start:
    cli
    movl %esp, %ebx
    lgdt PHYSICAL(gdt_register)
    ljmp $CODE64, $PHYSICAL(long_mode)

    .code64
long_mode:
    movl $DATA, %eax
    movl %eax, %ss
    leaq stack_top(%rip), %rsp
    movl %ebx, %edi
    addq $4, %rdi /* past the return address */
    call kernel_main

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00CF9B000000FFFF
    .quad 0x00CF93000000FFFF
    .quad 0x00AF9B000000FFFF
gdt_end:
gdt_register:
    .word gdt_end - gdt - 1
    .long PHYSICAL(gdt)

    .bss
    .balign 16
    .skip 4096
stack_top:

    .section .note.GNU-stack, "", @progbits
